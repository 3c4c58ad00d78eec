"""What became of an assignment on a rank, and what is answered about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import DataError, IntegrityError, SelectionError, TrainingError, UsageError
from orchestrator.train.loop import LoopState
from orchestrator.train.scoring import Scores
from orchestrator.work.assignment import TrialWork
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.results import EngineRecord, RungResult

TRIAL_ERRORS = (TrainingError, SelectionError, IntegrityError, UsageError, DataError)
"""What a trial may fail by while the gang stays whole: raised on every rank alike."""


@dataclass
class TrialOutcome:
    """What became of an assignment on this rank."""

    state: LoopState = field(default_factory=LoopState)
    scores: Scores = field(default_factory=Scores)
    checkpoint: Path | None = None
    train_seconds: float = 0.0
    steady_tokens_per_s: float | None = None
    engine: EngineRecord | None = None
    compile_seconds: float = 0.0
    relieved: ExecutionPlan | None = None
    """What it came down to where memory ran out."""


def result_of(assignment: TrialWork, outcome: TrialOutcome, reason: str) -> RungResult:
    """What the gang answers; with a `reason`, how far the trial came before it failed."""
    evaluation, retain = outcome.scores.evaluation, outcome.scores.retain
    return RungResult(
        trial_id=assignment.trial.trial_id,
        rung=assignment.rung,
        step=outcome.state.step,
        tokens=outcome.state.tokens,
        state="failed" if reason else "done",
        reason=reason,
        train_loss=outcome.state.loss,
        eval_loss=None if evaluation is None else evaluation.loss,
        metrics=outcome.scores.metrics,
        retain_loss=None if retain is None else retain.loss,
        retain_accuracy=outcome.scores.retain_accuracy,
        checkpoint=None if outcome.checkpoint is None else str(outcome.checkpoint),
        engine=outcome.engine,
        relieved=outcome.relieved,
        steady_tokens_per_s=outcome.steady_tokens_per_s,
        train_seconds=outcome.train_seconds,
        eval_seconds=outcome.scores.seconds,
    )
