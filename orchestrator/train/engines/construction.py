"""Construction of the engine that an execution plan names, and what depends on its choice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from orchestrator.plan.remedies import LearningGroup
from orchestrator.train.adapters.branch import Branch, WeightKeeper
from orchestrator.train.engines.deepspeed_engine import DeepSpeedTrainer, forward_only
from orchestrator.train.engines.engine import Engine, is_partitioned
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.engines.zero3_warm import PartitionKeeper
from orchestrator.train.ranks import Ranks
from orchestrator.work.execution import ExecutionPlan, TrainSettings


def construct_engine(
    objective: nn.Module,
    branch: Branch,
    groups: Sequence[LearningGroup],
    execution: ExecutionPlan,
    settings: TrainSettings,
    ranks: Ranks,
    *,
    measuring: bool = False,
) -> Engine:
    """Return an engine that trains the branch's parameters.

    Args:
        groups: The parameters by learning rate, in the branch's order.
        measuring: Whether steps accumulate squared gradients and leave the weights unchanged.
    """
    if execution.executor == "torch":
        return TorchEngine(
            objective,
            branch.learning_parameters(),
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
            ranks=ranks,
            groups=groups,
            measuring=measuring,
        )
    return DeepSpeedTrainer(objective, branch.learning_parameters(), execution, settings, ranks, groups, measuring=measuring)


def forward_ready(objective: nn.Module, execution: ExecutionPlan) -> AbstractContextManager[None]:
    """Return a context in which the objective can be called without an engine: a partitioned base is gathered per module."""
    return forward_only(objective, execution) if is_partitioned(execution) else nullcontext()


def weight_keeper(execution: ExecutionPlan) -> WeightKeeper | None:
    """Return what saves and restores a partitioned base's weights around a branch; None for `open_branch`'s own default."""
    return PartitionKeeper() if is_partitioned(execution) else None
