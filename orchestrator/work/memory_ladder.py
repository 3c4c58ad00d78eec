"""The memory ladder: after running out of memory, the next smaller execution of the same trial in the same gang.

The documents of a step and their order stay the same, so that a relieved trial equals the trial that a plan with the smaller
execution would have run. Steps down, in the order of their cost:

1. half the rows in a micro-batch, and so twice the rounds of a step;
2. at one row, checkpointing: the blocks above the cut run again in the backward pass;
3. a higher ZeRO stage, up to 2, where several ranks share a trial by DeepSpeed: the base lies in memory as before.

What comes after (from torch to DeepSpeed, ZeRO-3, offloading, more ranks) needs another kind of gang, which is another plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import OutOfMemoryError
from orchestrator.values import Value
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.results import RungResult

HIGHEST_STAGE_WITH_A_WHOLE_BASE = 2
NO_SMALLER_WAY = "memory use cannot be reduced further in this gang"


@dataclass(frozen=True)
class Relief:
    """One step down, and the sentence that reports it."""

    execution: ExecutionPlan
    sentence: str
    """`started again with 2 rows per micro-batch and more accumulation rounds`."""


def relieve(execution: ExecutionPlan) -> Relief | None:
    """Return the next step down from `execution`; None if the gang has none left (see `beyond_the_gang`)."""
    rows = execution.micro_batch_rows // 2
    if rows:
        sentence = f"restarted with {rows} row{'s' if rows > 1 else ''} per micro-batch and more accumulation rounds"
        return Relief(execution.model_copy(update={"micro_batch_rows": rows}), sentence)
    if not execution.checkpointing:
        return Relief(execution.model_copy(update={"checkpointing": True}), "restarted with gradient checkpointing")
    partitions = execution.executor == "deepspeed" and execution.ranks > 1
    if partitions and execution.zero_stage < HIGHEST_STAGE_WITH_A_WHOLE_BASE:
        stage = execution.zero_stage + 1
        return Relief(execution.model_copy(update={"zero_stage": stage}), f"restarted at ZeRO-{stage}")
    return None


def beyond_the_gang(execution: ExecutionPlan) -> str:
    """Return which settings would free memory where no step down is left: they need another plan."""
    if execution.ranks == 1:
        return (
            "resources.ranks_per_gang: 2 with zero: 3, which partitions (shards) the base across ranks; or a "
            "smaller data.max_tokens"
        )
    if execution.zero_stage < 3:
        return "resources.zero: 3, which partitions (shards) the base across ranks; or a smaller data.max_tokens"
    more = f"more ranks than {execution.ranks} (resources.ranks_per_gang), or a smaller data.max_tokens"
    if execution.device == "cpu" or execution.offload == "parameters":
        return more
    return f"resources.offload: {'optimizer' if execution.offload == 'none' else 'parameters'}; or {more}"


def nothing_smaller(what: str, execution: ExecutionPlan) -> OutOfMemoryError:
    """Return the error of a trial for which there is no step down from `execution`; its message is the trial's reason."""
    return OutOfMemoryError(f"{what}; {NO_SMALLER_WAY}", remedy=beyond_the_gang(execution))


def fits_in_no_way(result: RungResult) -> bool:
    """Return whether a trial failed because memory cannot be reduced further; its reason ends with the remedy."""
    return result.state == "failed" and NO_SMALLER_WAY in result.reason


def with_relief(planned: ExecutionPlan, relieved: ExecutionPlan | None) -> ExecutionPlan:
    """Return `planned`, reduced to what a trial was relieved to before; a gang of another kind starts as planned.

    Args:
        relieved: The execution with which the trial was trained after running out of memory; None if it never did.
    """
    if relieved is None or planned.gang_kind != relieved.gang_kind:
        return planned
    return planned.model_copy(
        update={
            "micro_batch_rows": min(planned.micro_batch_rows, relieved.micro_batch_rows),
            "checkpointing": planned.checkpointing or relieved.checkpointing,
            "zero_stage": max(planned.zero_stage, relieved.zero_stage),
        }
    )


STEPPED_DOWN = "stepped-down.json"
"""File beside those of an assignment: its execution after a worker group ran out of memory."""


class SteppedDown(Value):
    """The execution of an assignment that ran out of memory, also for the next worker group."""

    execution: ExecutionPlan | None
    """The next smaller execution; None if there is none left."""
    notes: tuple[str, ...]
    reason: str
    """The error of the worker group that ran out of memory."""
