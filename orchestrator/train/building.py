"""From an open branch to its engine."""

from __future__ import annotations

from torch import nn

from orchestrator.plan.values import ExecutionPlan, TrainSettings
from orchestrator.train.branch import Branch
from orchestrator.train.engine import Engine
from orchestrator.train.ranks import Ranks
from orchestrator.train.torch_engine import TorchEngine


def build_engine(objective: nn.Module, branch: Branch, settings: TrainSettings, execution: ExecutionPlan, ranks: Ranks) -> Engine:
    """The engine of the planned executor around what learns in a branch."""
    if execution.executor == "torch":
        return TorchEngine(
            objective,
            branch.learning_parameters(),
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
            ranks=ranks,
        )
    from orchestrator.train.deepspeed_engine import DeepSpeedTrainer

    return DeepSpeedTrainer(objective, branch.learning_parameters(), execution, settings, ranks)
