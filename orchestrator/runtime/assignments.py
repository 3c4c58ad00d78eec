"""What goes to the exchange and what comes back: orders, work, answers, and how its gangs spent their time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan.values import Assignment, DataPaths, RungResult, RunPlan, TrainSettings
from orchestrator.runtime.scoring import Scoring
from orchestrator.transfer import WORST_SCORE
from orchestrator.values import Value


class Orders(Value):
    """What the exchange needs to know of the run."""

    plan: RunPlan
    anatomy: ModelAnatomy
    settings: TrainSettings
    data: DataPaths
    scoring: Scoring
    trials_folder: str
    num_gangs: int


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
class Work:
    """One assignment on its way; smaller is served first."""

    priority: tuple[int, int, int]
    """The untouched base first, since every score needs it; then the higher rung; then who came first."""
    assignment: Assignment = field(compare=False)
    future: asyncio.Future[RungResult] = field(compare=False)
    attempts: int = field(default=0, compare=False)


@dataclass
class GangFigures:
    """How a gang spent its time, seconds."""

    idle_s: list[float] = field(default_factory=list)
    """Each gap between the end of an assignment and the start of the next."""
    busy_s: float = 0.0
    start_s: list[float] = field(default_factory=list)
    base_loads: int = 0
    replaced: int = 0


def failed_answer() -> Answer:
    """For a trial that ended without any result."""
    return Answer(score=WORST_SCORE, step=0, ended=True, state="failed")


def failed_result(assignment: Assignment, reason: str) -> RungResult:
    """For an assignment that no gang brought to an end."""
    return RungResult(trial_id=assignment.trial.trial_id, rung=assignment.rung, step=0, tokens=0, state="failed", reason=reason)
