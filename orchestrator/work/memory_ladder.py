"""Reduce memory use: the next smaller execution of the same work in the same kind of gang, after memory ran out.

The documents of a step and their order stay the same, so that a trial with a reduced execution is the trial that a plan with
that execution would have run. The steps, in the order of what they cost:

1. half the rows in a micro-batch, and so twice the accumulation rounds of a step;
2. at one row, gradient checkpointing: the blocks above the cut run again in the backward pass;
3. a higher ZeRO stage, up to 2, where several ranks share a trial by DeepSpeed: each of them still holds the complete base.

Further reductions (from torch to DeepSpeed, ZeRO-3, offloading, more ranks) need another kind of gang and so another plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from pydantic import model_validator

from orchestrator.units import printable_lines
from orchestrator.values import Value
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure

HIGHEST_STAGE_WITH_A_WHOLE_BASE = 2


@dataclass(frozen=True)
class SmallerExecution:
    """One step down the ladder."""

    execution: ExecutionPlan
    note: str
    """`out of memory: restarted with 2 rows per micro-batch and more accumulation rounds`."""


@dataclass(frozen=True)
class MemoryLadder:
    """The steps that reduce the memory use of work, one each time it runs out of memory.

    Args:
        replaced: What must be replaced after running out of memory (`gang`), for the note; empty if nothing must.
    """

    replaced: str = ""

    def step(self, execution: ExecutionPlan, what: str) -> SmallerExecution | Failure:
        """Return the next smaller execution, or the failure where there is none.

        Args:
            execution: The execution that ran out of memory.
            what: The message about it.
        """
        smaller = _next_smaller(execution)
        if smaller is None:
            message = printable_lines(f"{what}; memory use cannot be reduced further in this gang")
            return Failure(kind="out_of_memory", message=message, remedy=beyond_the_gang(execution))
        if self.replaced:
            return SmallerExecution(smaller[0], f"out of memory: the {self.replaced} was replaced and the trial {smaller[1]}")
        return SmallerExecution(smaller[0], f"out of memory: {smaller[1]}")


def _next_smaller(execution: ExecutionPlan) -> tuple[ExecutionPlan, str] | None:
    """Return the next smaller execution and how the trial continues, `restarted at ZeRO-2`."""
    rows = execution.micro_batch_rows // 2
    if rows:
        how = f"restarted with {rows} row{'s' if rows > 1 else ''} per micro-batch and more accumulation rounds"
        return execution.model_copy(update={"micro_batch_rows": rows}), how
    if not execution.checkpointing:
        return execution.model_copy(update={"checkpointing": True}), "restarted with gradient checkpointing"
    partitions = execution.executor == "deepspeed" and execution.ranks > 1
    if partitions and execution.zero_stage < HIGHEST_STAGE_WITH_A_WHOLE_BASE:
        stage = execution.zero_stage + 1
        return execution.model_copy(update={"zero_stage": stage}), f"restarted at ZeRO-{stage}"
    return None


def beyond_the_gang(execution: ExecutionPlan) -> str:
    """Return the remedy when the ladder has no step left: the planner's next choice, which needs another plan."""
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


def no_larger_than(planned: ExecutionPlan, reduced: ExecutionPlan | None) -> ExecutionPlan:
    """Return the planned execution, reduced as far as a trial was reduced before; as planned in a gang of another kind.

    Args:
        reduced: The trial's execution after it ran out of memory; None if it never did.
    """
    if reduced is None or planned.gang_kind != reduced.gang_kind:
        return planned
    return planned.model_copy(
        update={
            "micro_batch_rows": min(planned.micro_batch_rows, reduced.micro_batch_rows),
            "checkpointing": planned.checkpointing or reduced.checkpointing,
            "zero_stage": max(planned.zero_stage, reduced.zero_stage),
        }
    )


REDUCED_WORK = "stepped-down.json"
"""File in an assignment's folder: its execution after a worker group ran out of memory."""


class ReducedWork(Value):
    """The execution of an assignment that ran out of memory, also for a later worker group."""

    execution: ExecutionPlan | None
    """The smaller execution; None where it failed."""
    notes: tuple[str, ...] = ()
    reason: str = ""
    """The message about the last step."""
    failure: Failure | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_failure(cls, values: object) -> object:
        """Accept records of older versions, which have only the text of a failure."""
        if not isinstance(values, dict):
            return values
        given = cast("dict[str, object]", values)
        if given.get("execution") is None and given.get("failure") is None:
            return {**given, "failure": Failure.recorded(str(given.get("reason", "")))}
        return given
