"""What goes to the exchange and what comes back: orders, work, answers, and how its gangs spent their time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.anatomy import LayerSelection, ModelAnatomy
from orchestrator.errors import IntegrityError, TrainingError
from orchestrator.plan import train_rung, work_context
from orchestrator.plan.values import SweepPlan
from orchestrator.run.scoring import Scoring
from orchestrator.runtime.gang import GangDiedError
from orchestrator.runtime.hang_detection import HangTimeouts
from orchestrator.store import read_json
from orchestrator.transfer import WORST_SCORE
from orchestrator.values import Value
from orchestrator.work.assignment import TrainRung, Work, WorkContext
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.failure import Failure
from orchestrator.work.memory_ladder import MemoryLadder, no_larger_than
from orchestrator.work.results import RungResult, WorkResult
from orchestrator.work.trial import TrialSpec

LADDER = MemoryLadder(replaced="gang")
MAX_ATTEMPTS = 3
"""How often an assignment is tried on a new gang, and how often a gang is started, before giving up."""


class Orders(Value):
    """What the exchange needs to know of the run."""

    plan: SweepPlan
    anatomy: ModelAnatomy
    settings: TrainSettings
    data: DataPaths
    scoring: Scoring
    trials_folder: str
    num_gangs: int
    hours_file: str
    max_gpu_hours: float | None = None
    timeouts: HangTimeouts = HangTimeouts()

    def context(self) -> WorkContext:
        """Return what all work of the search shares."""
        return work_context(self.plan, settings=self.settings, data=self.data, metric=self.scoring.metric)


class Answer(Value):
    """What a thin trial gets back for one rung."""

    score: float
    step: int
    ended: bool
    """True when the trial must not ask for another rung."""
    state: str
    reason: str = ""
    """Why it failed."""
    metric: float | None = None


@dataclass(order=True)
class QueuedWork:
    """Work on its way to a gang and back; smaller is served first."""

    priority: tuple[int, int, int]
    """The untouched base first, since every score needs it; then the higher rung; then who came first."""
    assignment: Work = field(compare=False)
    future: asyncio.Future[WorkResult | None] = field(compare=False)
    """None where the bound on GPU-hours was reached before a gang took it up."""
    attempts: int = field(default=0, compare=False)
    """Gangs that died while running it, for want of anything but memory."""
    notes: list[str] = field(default_factory=list, compare=False)
    """What happened on gangs that are gone; the result's notes begin with them."""
    home: int | None = field(default=None, compare=False)
    """The gang that ran the trial's last rung, and may remember it."""

    def answer(self, result: WorkResult | None) -> None:
        """To whoever waits; nothing happens where the trial has ended meanwhile."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Whoever waits hears of what is no trial's own failure."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass
class GangFigures:
    """How a gang spent its time, seconds."""

    idle_s: list[float] = field(default_factory=list)
    """Each gap between the end of an assignment and the start of the next."""
    busy_s: float = 0.0
    start_s: list[float] = field(default_factory=list)
    base_loads: int = 0
    replaced: int = 0


def rung_assignment(
    plan: SweepPlan,
    context: WorkContext,
    trial: TrialSpec,
    selection: LayerSelection,
    folder: str,
    results: Sequence[RungResult],
    rung: int,
    stop_step: int,
) -> TrainRung:
    """Return a trial's next rung, from where its last one ended, with memory use as reduced as it ended.

    Args:
        folder: The trial's folder.
        results: Results of its rungs so far.
    """
    before = results[-1] if results else None
    return train_rung(
        plan,
        context,
        trial,
        selection,
        folder=folder,
        rung=rung,
        start=_resumable(before.checkpoint) if before else None,
        stop_step=stop_step,
        execution=no_larger_than(plan.execution, before.reduced_execution if before else None),
        keep_optimizer=stop_step < trial.total_steps,
    )


def _resumable(checkpoint: str | None) -> str | None:
    """A rung to go on from; None, so that the trial starts again, where it has been cleaned of its optimizer state."""
    if checkpoint is None:
        return None
    try:
        state = read_json(Path(checkpoint) / "state.json")
    except (IntegrityError, OSError):
        return checkpoint  # the gang looks for an earlier one that is whole
    return None if isinstance(state, dict) and state.get("has_optimizer") is False else checkpoint


def answer_of(results: Sequence[RungResult], base: RungResult | None, scoring: Scoring, *, ended: bool) -> Answer:
    """What a trial is worth after its last rung, scored against the untouched base.

    Args:
        results: Results of its rungs so far.
    """
    result = results[-1]
    judged = scoring.judged(results, base) if result.state == "done" else result
    return Answer(
        score=scoring.score(judged, base),
        step=result.step,
        ended=ended,
        state=result.state,
        reason=result.reason,
        metric=scoring.metric_of(judged),
    )


def failed_answer() -> Answer:
    """For a trial that ended without any result."""
    return Answer(score=WORST_SCORE, step=0, ended=True, state="failed")


def held_back_answer(reason: str) -> Answer:
    """For a trial that was not begun, for want of GPU-hours."""
    return Answer(score=WORST_SCORE, step=0, ended=True, state="stopped", reason=reason)


def next_attempt(work: QueuedWork, death: TrainingError, planned: ExecutionPlan) -> WorkResult | None:
    """Prepare work for another gang after one failed while running it: as it is, or with less memory where that ran out.

    Running out of memory does not count as an attempt: each time leads to a smaller execution, so that this ends by itself.

    Args:
        planned: What the plan gives every trial.

    Returns:
        The failed result where there is nothing left to try; None where the work goes back to the queue.
    """
    assignment = work.assignment
    if not (isinstance(death, GangDiedError) and death.out_of_memory):
        work.attempts += 1
        if work.attempts < MAX_ATTEMPTS:
            return None
        message = f"{MAX_ATTEMPTS} gangs died while running it, the last: {death.description}"
        return with_history(assignment.failed(Failure(kind="gang", message=message, remedy=death.remedy)), work, planned)
    smaller = LADDER.step(assignment.execution, death.what)
    if isinstance(smaller, Failure):
        return with_history(assignment.failed(smaller), work, planned)
    work.notes.append(smaller.note)
    work.assignment = assignment.model_copy(update={"execution": smaller.execution})
    return None


def with_history(result: WorkResult, work: QueuedWork, planned: ExecutionPlan) -> WorkResult:
    """Return a result with the notes from gangs that failed before, and for a rung its reduced execution."""
    if not isinstance(result, RungResult):
        return result.model_copy(update={"notes": (*work.notes, *result.notes)})
    execution = work.assignment.execution
    reduced = result.reduced_execution or (execution if execution != planned else None)
    return result.model_copy(update={"notes": (*work.notes, *result.notes), "reduced_execution": reduced})
