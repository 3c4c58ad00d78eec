"""The only room with Ray: gangs, the exchange, the search, the refit, and the jobs that put them together.

outcome = run_sweep(load_spec("spec.yaml"), view=view)        # search, refit, merge, verify, bundle
outcome = run_finetune(load_spec("spec.yaml"), view=view)     # the spec's one trial
outcome = merge_trial(run_folder, None, view=view)            # the promoted trial of a finished run, or another by hand
probe_cluster()                                               # what the live cluster has
"""

from orchestrator.runtime import private_token  # isort: skip - before ray is imported
from orchestrator.run.records import RunOutcome, read_outcome
from orchestrator.runtime.cluster import probe_cluster
from orchestrator.runtime.dry_run import Rehearsal, rehearse
from orchestrator.runtime.finetune import run_finetune
from orchestrator.runtime.merging import merge_trial
from orchestrator.runtime.sweep import run_sweep

__all__ = [
    "Rehearsal",
    "RunOutcome",
    "merge_trial",
    "private_token",
    "probe_cluster",
    "read_outcome",
    "rehearse",
    "run_finetune",
    "run_sweep",
]
