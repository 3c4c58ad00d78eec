"""Values exchanged with the exchange actor: orders, queued work, answers, and how each gang spent its time."""

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
"""Maximum number of gangs that an assignment is tried on, and of attempts to start a gang."""


class Orders(Value):
    """The parameters of the run that the exchange needs."""

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
        """Return the fields that all work of the search shares."""
        return work_context(self.plan, settings=self.settings, data=self.data, metric=self.scoring.metric)


class Answer(Value):
    """The exchange's answer to a thin trial (Tune's side of a trial, which trains nothing itself) for one rung."""

    score: float
    step: int
    ended: bool
    """True if the trial must not request another rung."""
    state: str
    reason: str = ""
    """Why the trial failed or was stopped; empty otherwise."""
    metric: float | None = None


@dataclass(order=True)
class QueuedWork:
    """Work submitted to the gangs, until its caller has the result; smaller values are served first."""

    priority: tuple[int, int, int]
    """The base model first, since every score needs it; then higher rungs; then by order of submission."""
    assignment: Work = field(compare=False)
    future: asyncio.Future[WorkResult | None] = field(compare=False)
    """Its result; None if the limit on GPU-hours was reached before a gang started it."""
    attempts: int = field(default=0, compare=False)
    """Number of gangs that failed while running it, except by running out of memory."""
    notes: list[str] = field(default_factory=list, compare=False)
    """Notes about gangs that failed while running it; the result's notes begin with them."""
    home: int | None = field(default=None, compare=False)
    """Index of the gang that ran the trial's last rung and may still hold its state in memory."""

    def answer(self, result: WorkResult | None) -> None:
        """Return the result to the caller that waits for it; does nothing if the trial has ended meanwhile."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Raise an error in the caller that waits: one that is not a failure of the trial itself."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass
class GangFigures:
    """The time that a gang spent idle, busy and starting, in seconds."""

    idle_s: list[float] = field(default_factory=list)
    """Each gap between the end of a group of work and the start of the next."""
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
    """Return a trial's next rung: it continues from the last one, with an execution as small as that one ended with.

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
    """Return a checkpoint that can be resumed; None if its optimizer state was deleted, so that the trial starts again."""
    if checkpoint is None:
        return None
    try:
        state = read_json(Path(checkpoint) / "state.json")
    except (IntegrityError, OSError):
        return checkpoint  # the gang looks for an earlier complete one
    return None if isinstance(state, dict) and state.get("has_optimizer") is False else checkpoint


def answer_of(results: Sequence[RungResult], base: RungResult | None, scoring: Scoring, *, ended: bool) -> Answer:
    """Return the answer for a trial's last rung, scored against the base model.

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
    """Return the answer for a trial that ended without any result."""
    return Answer(score=WORST_SCORE, step=0, ended=True, state="failed")


def held_back_answer(reason: str) -> Answer:
    """Return the answer for a trial that was not started because the GPU-hours were spent."""
    return Answer(score=WORST_SCORE, step=0, ended=True, state="stopped", reason=reason)


def next_attempt(work: QueuedWork, death: TrainingError, planned: ExecutionPlan) -> WorkResult | None:
    """Prepare work for another gang after one failed while running it: unchanged, or smaller after running out of memory.

    Running out of memory does not count as an attempt: each time the execution gets smaller, so the number of retries is bounded.

    Args:
        planned: The execution that the plan gives every trial.

    Returns:
        The failed result if there is nothing left to try; None if the work must be requeued.
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
