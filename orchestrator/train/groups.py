"""Trials that share batches on one host: how many, and what becomes of each."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from orchestrator.errors import OrchestratorError
from orchestrator.train import pulse
from orchestrator.train.fused import FusedRun
from orchestrator.train.memory import first_line, is_out_of_memory, reset_peak
from orchestrator.train.outcome import TRIAL_ERRORS, TrialOutcome, result_of
from orchestrator.train.widths import best_width, kind_of_batch
from orchestrator.work.assignment import TrainRung, Work
from orchestrator.work.results import StepReport, WorkResult

if TYPE_CHECKING:
    from orchestrator.train.host import TrainHost

logger = logging.getLogger(__name__)
OnStep = Callable[[StepReport], None] | None


class Groups:
    """What a host has learned of widths, and how it runs a group by it."""

    def __init__(self, host: TrainHost) -> None:
        self._host = host
        self.widths: dict[tuple[int, int, int], int] = {}
        """By kind of batch, how many trials had better share one."""
        self._tried: dict[tuple[int, int, int], int] = {}
        """By kind of batch, how many trials the group had that was measured."""

    def run(self, group: Sequence[Work], on_step: OnStep) -> list[WorkResult]:
        """See `TrainHost.run_group`."""
        rungs = [assignment for assignment in group if isinstance(assignment, TrainRung)]
        if len(rungs) < len(group):  # nothing but a rung shares a batch
            return [self._host.carry(assignment, on_step) for assignment in group]
        return self._run_rungs(rungs, on_step)

    def _run_rungs(self, group: Sequence[TrainRung], on_step: OnStep) -> list[WorkResult]:
        group = sorted(group, key=lambda assignment: assignment.trial.lora_rank or 0)  # equal ranks are stacked
        results: list[WorkResult] = []
        while len(results) < len(group):
            rest = group[len(results) :]
            started = time.time()
            part = rest[: self._width_of(rest)]
            if len(part) == 1:
                results.append(self._host.carry_trial(part[0], on_step).model_copy(update={"started_at": started}))
            else:
                results += self._run_fused(part, started, on_step)
        return results

    def _width_of(self, group: Sequence[TrainRung]) -> int:
        """How many of the group share a batch; measured for each kind of batch, and again for the first group in which
        twice as many could, where nobody has tried that."""
        first, kind = group[0], kind_of_batch(group[0])
        if first.execution.compiled:
            return 1  # each company would need code of its own
        wider = 2 * self.widths.get(kind, 1)
        if wider <= len(group) and (kind not in self.widths or self._tried.get(kind, wider) < wider):
            self._tried[kind] = len(group)
            self.widths[kind], said = self._measured(first, group)
            self._host.news.append(said)
        return min(len(group), self.widths.get(kind, 1))

    def _measured(self, first: TrainRung, group: Sequence[TrainRung]) -> tuple[int, str]:
        """A trial that breaks the measurement is run alone, where it fails by itself.

        Raises:
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it.
        """
        try:
            self._host.open_trunk(first, self._host.news.append)
            pulse.enter("preparing")
            run = self._host.trial_run(first, first.execution, self._host.news, TrialOutcome())
            return best_width(self._host.base, group, run.sets.steps, run.rows, run.sets.states, self._host.ranks)
        except (*TRIAL_ERRORS, RuntimeError, MemoryError) as error:
            if not (isinstance(error, TRIAL_ERRORS) or is_out_of_memory(error)):
                raise
            if is_out_of_memory(error):
                self._host.check_shared(error)
            gc.collect()
            return 1, f"trials are not batched together: {first_line(error)}"

    def _run_fused(self, group: Sequence[TrainRung], started: float, on_step: OnStep) -> Sequence[WorkResult]:
        """All of them in one batch; in halves where memory runs out, alone where it fails for any other reason."""
        host = self._host
        told, host.news[:] = [*host.news], []
        notes: list[list[str]] = [[] for _ in group]
        outcomes = [TrialOutcome() for _ in group]
        try:
            trunk_seconds = host.open_trunk(group[0], told.append)
            pulse.enter("preparing")
            reset_peak(host.ranks.device)
            runs = [
                host.trial_run(assignment, assignment.execution, own, outcome, len(group))
                for assignment, own, outcome in zip(group, notes, outcomes, strict=True)
            ]
            failures = FusedRun(host.base, runs).run(on_step)
        except (*TRIAL_ERRORS, RuntimeError, MemoryError) as error:
            host.news += told
            return self._apart(group, error, on_step)
        host.finish(*group)
        notes[0] = [*told, *notes[0]]
        seconds = trunk_seconds / len(group)
        return [
            result_of(assignment, outcome, str(failure or "")).model_copy(
                update={"started_at": started, "finished_at": time.time(), "notes": tuple(own), "trunk_seconds": seconds}
            )
            for assignment, outcome, failure, own in zip(group, outcomes, failures, notes, strict=True)
        ]

    def _apart(self, group: Sequence[TrainRung], error: Exception, on_step: OnStep) -> Sequence[WorkResult]:
        """The group once more, from where each of its trials began.

        Raises:
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it.
            Exception: `error`, where it is neither a trial's own nor a want of memory.
        """
        host = self._host
        if is_out_of_memory(error):
            host.check_shared(error)
            gc.collect()
            if host.give_up_held():
                host.news.append("out of memory: cached state of other rungs is released, and the batch is restarted")
                return self._run_rungs(group, on_step)
            kind, width = kind_of_batch(group[0]), len(group) // 2
            self.widths[kind] = width
            self._tried.pop(kind, None)  # never wider again
            host.news.append(f"out of memory: trials per batch reduced from {len(group)} to {width}")
            return self._run_rungs(group, on_step)
        if not isinstance(error, OrchestratorError):
            raise error
        host.news.append(f"{len(group)} trials cannot share a batch and are run separately: {error}")
        return [host.carry(assignment, on_step) for assignment in group]
