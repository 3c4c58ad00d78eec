"""How many trials share a batch: measured on the machine, since what pays there nobody can say beforehand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from orchestrator.errors import OutOfMemoryError
from orchestrator.train.adapters.group import open_group
from orchestrator.train.batches import RowPlan, StepInput, StepPlan, step_inputs
from orchestrator.train.fused import accumulate, spec_of
from orchestrator.train.memory import is_out_of_memory
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.work.assignment import TrainRung

GAIN = 0.97
"""A wider batch is taken where it needs at most this share of the time of the narrower one, a trial: less is noise."""
TIMED = 2


def kind_of_batch(assignment: TrainRung) -> tuple[int, int, int]:
    """What decides how many trials had better share one: where it begins, its rows, and their width."""
    execution = assignment.execution
    return (assignment.selection.cut, execution.micro_batch_rows, execution.row_tokens)


def best_width(
    base: LoadedBase, group: Sequence[TrainRung], steps: StepPlan, rows: RowPlan, trunk: TrunkStates | None, ranks: Ranks
) -> tuple[int, str]:
    """The number of trials in a batch at which a trial's micro-batch takes least time, and a sentence about it.

    Widths of 1, 2, 4, ... are tried on the first micro-batch, forward and backward, as long as they gain. Nothing
    learns; the base is left as it was. Called on every rank: the slowest decides, and every rank gets the same answer.

    Args:
        base: With no branch open.
        group: Trials that may share a batch.
        steps: Of these trials.
        rows: How documents share rows.
        trunk: What is stored of the training set.
        ranks: This process among those that train the trials together.

    Raises:
        OutOfMemoryError: on every rank alike, where one has no memory for a single trial.
    """
    step = next(step_inputs(steps, rows, 0, 1, trunk))
    step = StepInput(step.epoch, step.num_tokens, step.num_supervised, step.micro_batches[:1])
    alone = _slowest(base, group[:1], step, ranks)
    if alone is None:
        raise OutOfMemoryError("out of memory in the first micro-batch of one trial")
    best, seconds, width = 1, {1: alone}, 2
    while width <= len(group):
        together = _slowest(base, group[:width], step, ranks)
        if together is None:
            break
        seconds[width] = together / width
        if seconds[width] > GAIN * seconds[best]:
            break
        best, width = width, 2 * width
    said = ", ".join(f"{count}: {1e3 * each:.1f} ms" for count, each in seconds.items())
    return best, f"{best} trials share a batch (time per trial's micro-batch, by trials in a batch: {said})"


def _slowest(base: LoadedBase, group: Sequence[TrainRung], step: StepInput, ranks: Ranks) -> float | None:
    """Seconds on the slowest rank; None where any has no memory for so many. Nothing is sent before all have measured."""
    own: float | None = None
    try:
        own = _seconds(base, group, step)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    every = ranks.gather(own)
    return None if None in every else max(every)


def _seconds(base: LoadedBase, group: Sequence[TrainRung], step: StepInput) -> float:
    """The fastest of a few forward and backward passes, after one to warm up."""
    with ExitStack() as stack:
        opened = stack.enter_context(open_group(base, [spec_of(assignment) for assignment in group]))
        cut = group[0].selection.cut
        objective = objective_of(base, opened.branches[0].head(), cut)
        if group[0].execution.checkpointing:
            blocks = base.model.get_submodule(base.anatomy.blocks_module)
            stack.enter_context(recomputed(list(blocks.children())[cut:]))
        times: list[float] = []
        for _ in range(1 + TIMED):
            started = time.perf_counter()
            accumulate(objective, step, len(group), max(1, step.num_supervised))
            times.append(time.perf_counter() - started)
        return min(times[1:])
