"""Entry points for `ray job submit`: `python -m jobs.sweep SPEC`, `jobs.finetune`, `jobs.merge`."""
