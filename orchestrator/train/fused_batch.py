"""Choose how many trials share a batch, by measuring: the fastest number on a machine is not known beforehand."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from orchestrator.errors import OutOfMemoryError
from orchestrator.train import heartbeat
from orchestrator.train.batches import StepInput, step_inputs
from orchestrator.train.context import HostContext
from orchestrator.train.loop import StackedRounds
from orchestrator.train.memory import first_line, is_out_of_memory
from orchestrator.train.memory_retry import check_shared
from orchestrator.train.outcome import TRIAL_ERRORS
from orchestrator.train.session import open_stacked, prepared_objective
from orchestrator.train.training_sets import TrainingSets
from orchestrator.work.assignment import TrainRung

GAIN = 0.97
"""A larger batch is taken where a trial needs at most this share of its time in the smaller one: less is noise."""
TIMED = 2
BatchKind = tuple[int, int, int]


def kind_of_batch(work: TrainRung) -> BatchKind:
    """Return the key by which fused batch sizes are measured: the cut, the rows of a micro-batch and their width."""
    execution = work.execution
    return (work.selection.cut, execution.micro_batch_rows, execution.row_tokens)


class FusedBatchSizes:
    """The measured fused batch sizes of this host, by kind of batch. Every rank computes the same numbers."""

    def __init__(self, context: HostContext) -> None:
        self._context = context
        self._sizes: dict[BatchKind, int] = {}
        self._tried: dict[BatchKind, int] = {}
        """Size of the largest group for which the fused batch size was measured, by kind of batch."""

    def choose(self, group: Sequence[TrainRung], note: Callable[[str], None]) -> int:
        """Return how many of the group share the next batch.

        It is measured for each kind of batch, and measured again for the first group in which twice as many could share
        one, where that has not been tried.

        Args:
            group: Trials that may share a batch.
            note: Called with a sentence about the measurement.

        Raises:
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it.
        """
        first, kind = group[0], kind_of_batch(group[0])
        if first.execution.compiled:
            return 1  # each set of batched trials would need its own compilation
        # The first group of a kind is often small, since trials arrive one by one: a size measured with two says nothing about
        # four.
        larger = 2 * self._sizes.get(kind, 1)
        if larger <= len(group) and (kind not in self._sizes or self._tried.get(kind, larger) < larger):
            self._tried[kind] = len(group)
            self._sizes[kind], sentence = self._measured(group, note)
            note(sentence)
        return min(len(group), self._sizes.get(kind, 1))

    def limit(self, work: TrainRung, size: int) -> None:
        """Have at most so many trials of this kind share a batch, and never measure again: a larger batch ran out of memory."""
        kind = kind_of_batch(work)
        self._sizes[kind] = size
        self._tried.pop(kind, None)

    def _measured(self, group: Sequence[TrainRung], note: Callable[[str], None]) -> tuple[int, str]:
        """Return the measured size and a sentence about it; 1 if the measurement fails: a trial run alone then reports its own
        failure."""
        try:
            self._context.open_trunk(group[0].trunk, group[0].data, note)
            heartbeat.enter("preparing")
            return measure_batch_size(self._context, group)
        except (*TRIAL_ERRORS, RuntimeError, MemoryError) as error:
            if not (isinstance(error, TRIAL_ERRORS) or is_out_of_memory(error)):
                raise
            if is_out_of_memory(error):
                check_shared(self._context.ranks, error)
            gc.collect()
            return 1, f"trials are not batched together: {first_line(error)}"


def measure_batch_size(context: HostContext, group: Sequence[TrainRung]) -> tuple[int, str]:
    """Measure at which number of trials in a batch a trial's micro-batch takes least time.

    Batches of 1, 2, 4, ... trials are timed on the first micro-batch, forward and backward, as long as each is faster than
    the one before. Nothing is trained; the base is left as it was. Called on every rank: the slowest decides, and every
    rank gets the same answer.

    Args:
        context: What this rank holds, with no branch open.
        group: Trials that may share a batch.

    Returns:
        The number, and a sentence about it.

    Raises:
        OutOfMemoryError: on every rank, where one has no memory for a single trial.
    """
    sets = TrainingSets(group[0], context.sets.load, context.trunk)
    step = next(step_inputs(sets.steps, context.rows(group[0].execution), 0, 1, sets.states))
    # One full micro-batch is enough; a complete step could take minutes.
    step = StepInput(step.epoch, step.num_tokens, step.num_supervised, step.micro_batches[:1])
    alone = _slowest(context, group[:1], step)
    if alone is None:
        raise OutOfMemoryError("out of memory in the first micro-batch of one trial")
    best, seconds, size = 1, {1: alone}, 2
    while size <= len(group):
        together = _slowest(context, group[:size], step)
        if together is None:
            break
        seconds[size] = together / size
        # Time per trial falls, then rises once the device is busy: the first size without a gain ends the search.
        if seconds[size] > GAIN * seconds[best]:
            break
        best, size = size, 2 * size
    times = ", ".join(f"{count}: {1e3 * each:.1f} ms" for count, each in seconds.items())
    return best, f"{best} trials share a batch (time per trial's micro-batch, by trials in a batch: {times})"


def _slowest(context: HostContext, group: Sequence[TrainRung], step: StepInput) -> float | None:
    """Return the seconds of the slowest rank; None where any has no memory for so many trials.

    Ranks communicate only after all of them have measured, so that one that ran out of memory does not leave others waiting.
    """
    own: float | None = None
    try:
        own = _seconds(context, group, step)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    every = context.ranks.gather(own)
    return None if None in every else max(every)


def _seconds(context: HostContext, group: Sequence[TrainRung], step: StepInput) -> float:
    """Return the seconds of the fastest of a few forward and backward passes, after one to warm up."""
    base, first = context.base, group[0]
    with ExitStack() as stack:
        branches = open_stacked(base, group, stack)
        objective = prepared_objective(base, branches[0], first.selection.cut, first.execution, stack)
        rounds = StackedRounds(objective, len(group))
        times: list[float] = []
        for _ in range(1 + TIMED):
            started = time.perf_counter()
            rounds.accumulate(step, max(1, step.num_supervised))
            times.append(time.perf_counter() - started)
        return min(times[1:])
