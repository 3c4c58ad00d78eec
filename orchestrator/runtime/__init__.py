"""The only room that imports Ray: gangs, the exchange, the search, the refit, and the jobs that combine them.

    outcome = run_sweep(load_spec("spec.yaml"), view=view)        # search, refit, merge, verify, bundle
    outcome = run_finetune(load_spec("spec.yaml"), view=view)     # the spec's one trial
    outcome = merge_trial(run_folder, None, view=view)            # the promoted trial of a finished run, or another by hand
    probe_cluster()                                               # the resources of the live cluster

The names below are imported on first use. Ray starts every worker process by importing the module of what it runs, and this
package with it: a Tune trial and the exchange would otherwise import torch and transformers, which they never use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from orchestrator.runtime import private_token  # isort: skip - before anything imports ray

if TYPE_CHECKING:
    from orchestrator.runtime.cluster import probe_cluster
    from orchestrator.runtime.finetune import run_finetune
    from orchestrator.runtime.merging import merge_trial
    from orchestrator.runtime.prepare import Rehearsal, rehearse
    from orchestrator.runtime.sweep import run_sweep

_HOMES = {
    "Rehearsal": "prepare",
    "merge_trial": "merging",
    "probe_cluster": "cluster",
    "rehearse": "prepare",
    "run_finetune": "finetune",
    "run_sweep": "sweep",
}
__all__ = [
    "Rehearsal",
    "merge_trial",
    "private_token",
    "probe_cluster",
    "rehearse",
    "run_finetune",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
