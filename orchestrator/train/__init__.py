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
    from orchestrator.train.artifacts import load_artifact, read_artifact, save_artifact
    from orchestrator.train.base import LoadedBase, load_base
    from orchestrator.train.branch import Branch, open_branch
    from orchestrator.train.checkpoint import drop_later_checkpoints, find_latest, find_own
    from orchestrator.train.evaluation import Evaluation, evaluate
    from orchestrator.train.generate import continue_prompts, generate_answers
    from orchestrator.train.host import TrainHost
    from orchestrator.train.objective import Objective

_HOMES = {
    "Branch": "branch",
    "Evaluation": "evaluation",
    "LoadedBase": "base",
    "Objective": "objective",
    "TrainHost": "host",
    "continue_prompts": "generate",
    "drop_later_checkpoints": "checkpoint",
    "evaluate": "evaluation",
    "find_latest": "checkpoint",
    "find_own": "checkpoint",
    "generate_answers": "generate",
    "load_artifact": "artifacts",
    "load_base": "base",
    "open_branch": "branch",
    "read_artifact": "artifacts",
    "save_artifact": "artifacts",
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
