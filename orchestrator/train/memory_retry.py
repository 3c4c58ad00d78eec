"""Retry work after running out of memory: once every rank knows, it is restarted in the same gang with a smaller execution."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import OutOfMemoryError, RankOutOfMemoryError
from orchestrator.train.context import HostContext
from orchestrator.train.memory import first_line, is_out_of_memory, reset_peak
from orchestrator.train.ranks import Ranks
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.memory_ladder import MemoryLadder, SmallerExecution

Answer = TypeVar("Answer")
LADDER = MemoryLadder()
OnReduced = Callable[[ExecutionPlan, str], None]
"""Called on every rank with the smaller execution and the note about it, before the work is restarted."""


def run_within_memory(
    context: HostContext,
    attempt: Callable[[ExecutionPlan], Answer],
    execution: ExecutionPlan,
    notes: list[str],
    on_reduced: OnReduced | None = None,
) -> Answer:
    """Attempt the work, with the next smaller execution each time memory runs out and every rank knows.

    Before the first step down the gang releases what it holds of other trials, and the attempt is repeated as it was.

    Args:
        context: The state of this rank.
        attempt: The work under one execution; it leaves the base as it was, also where it raises.
        execution: As planned.
        notes: Receives a line for each restart (law 9).
        on_reduced: Called before each restart with a smaller execution.

    Raises:
        OutOfMemoryError: memory use cannot be reduced further in this gang; on every rank.
        RankOutOfMemoryError: memory ran out on this rank while the others wait for it.
    """
    while True:
        reset_peak(context.ranks.device)
        try:
            return attempt(execution)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            check_shared(context.ranks, error)
            smaller = None if context.release_cached_state() else _smaller(execution, error)
        # Collected out here: inside the handler the error's traceback still holds the tensors of the attempt.
        gc.collect()
        if smaller is None:
            notes.append("out of memory: cached state of other rungs is released, and the trial is restarted")
            continue
        execution = smaller.execution
        notes.append(smaller.note)
        context.saver.settle()  # a checkpoint of the larger execution must not be written after the restart
        if on_reduced is not None:
            on_reduced(execution, smaller.note)


def _smaller(execution: ExecutionPlan, error: BaseException) -> SmallerExecution:
    """Return the next smaller execution.

    Raises:
        OutOfMemoryError: there is none.
    """
    smaller = LADDER.step(execution, f"out of memory: {first_line(error)}")
    if isinstance(smaller, Failure):
        raise OutOfMemoryError(smaller.message, remedy=smaller.remedy) from None
    return smaller


def check_shared(ranks: Ranks, error: BaseException) -> None:
    """Check that every rank knows that memory ran out, so that all of them can restart together.

    Raises:
        RankOutOfMemoryError: the other ranks wait for this one; the gang must be replaced.
    """
    if not is_shared(ranks, error):
        raise RankOutOfMemoryError(f"out of memory on rank {ranks.rank}: {first_line(error)}") from error


def is_shared(ranks: Ranks, error: BaseException) -> bool:
    """Return whether every rank knows of the error; a single rank always does, several only after the training rounds."""
    return isinstance(error, OutOfMemoryError) or ranks.count == 1
