"""From one YAML file to a verified, domain-tuned model: plan, search, refit, merge, verify, bundle.

    import orchestrator

    plan = orchestrator.plan("spec.yaml")              # what it would do and take
    run = orchestrator.sweep("spec.yaml")              # search, refit, merge, verify, judge
    run = orchestrator.finetune("spec.yaml")           # the spec's one trial
    run = orchestrator.load_run("runs/math-tutor")     # .trials .figures .verdict .bundle.load() .report()

`api.py` has them (docs/api.md); they are imported when they are used, so that `import orchestrator` is quick.

The packages, from the lowest layer up: `spec` (what was asked), `anatomy` (what the base is), `work` (the values that pass
between packages), `plan` (what will be done), `transfer` (what the figures mean), `store` and `run` (what is on disk), `data`,
`train`, `serve` (what happens), `runtime` (Ray), `report`, `api`, `cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import Bundle, Run, finetune, load_run, plan, sweep

__version__ = "0.1.0"
__all__ = ["Bundle", "Run", "__version__", "finetune", "load_run", "plan", "sweep"]


def __getattr__(name: str) -> Any:
    if name == "plan":  # a package too, which can be called
        return import_module("orchestrator.plan")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("orchestrator.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
