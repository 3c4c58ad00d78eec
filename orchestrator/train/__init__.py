"""Training: the base loaded once, branches on it, one loop, two engines, evaluation, checkpoints. No Ray in here.

`TrainHost` is a rank of a gang: `create` joins it and loads the base, `run` carries a trial to its next rung, `close`
leaves. `load_base` and `open_branch` are the same steps by hand; `evaluate` scores an `Objective`; `find_latest` names
the newest whole checkpoint of a trial, and `drop_later_checkpoints` drops what came after one. What is imported here is
imported on first use, for torch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.train.adapters.artifacts import load_artifact, read_artifact, save_artifact
    from orchestrator.train.adapters.branch import Branch, open_branch
    from orchestrator.train.checkpoint.resume import drop_later_checkpoints, find_latest, find_own
    from orchestrator.train.evaluation import Evaluation, evaluate
    from orchestrator.train.generate import continue_prompts, generate_answers
    from orchestrator.train.host import TrainHost
    from orchestrator.train.model.base import LoadedBase, load_base
    from orchestrator.train.model.objective import Objective

_HOMES = {
    "Branch": "adapters.branch",
    "Evaluation": "evaluation",
    "LoadedBase": "model.base",
    "Objective": "model.objective",
    "TrainHost": "host",
    "continue_prompts": "generate",
    "drop_later_checkpoints": "checkpoint.resume",
    "evaluate": "evaluation",
    "find_latest": "checkpoint.resume",
    "find_own": "checkpoint.resume",
    "generate_answers": "generate",
    "load_artifact": "adapters.artifacts",
    "load_base": "model.base",
    "open_branch": "adapters.branch",
    "read_artifact": "adapters.artifacts",
    "save_artifact": "adapters.artifacts",
}
__all__ = [
    "Branch",
    "Evaluation",
    "LoadedBase",
    "Objective",
    "TrainHost",
    "continue_prompts",
    "drop_later_checkpoints",
    "evaluate",
    "find_latest",
    "find_own",
    "generate_answers",
    "load_artifact",
    "load_base",
    "open_branch",
    "read_artifact",
    "save_artifact",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
