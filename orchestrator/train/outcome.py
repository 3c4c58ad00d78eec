"""The outcome of a trial on a rank: filled while the trial runs, returned as a RungResult."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from orchestrator.errors import DataError, IntegrityError, SelectionError, TrainingError, UsageError
from orchestrator.train.context import HostContext
from orchestrator.train.engines.engine import num_live_engines
from orchestrator.train.loop import LoopState
from orchestrator.train.scoring import Scores
from orchestrator.work.assignment import EvaluateBase, TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.results import EngineRecord, RungResult

TRIAL_ERRORS = (TrainingError, SelectionError, IntegrityError, UsageError, DataError)
"""Errors that fail a trial but not its gang: they are raised on every rank."""

TrialWork = TypeVar("TrialWork", bound=TrainRung | EvaluateBase)


@dataclass
class TrialOutcome(Generic[TrialWork]):
    """The progress of a trial on this rank. It outlives an attempt that runs out of memory; the next one overwrites it."""

    work: TrialWork
    notes: list[str] = field(default_factory=list[str])
    started_at: float = field(default_factory=time.time)
    failure: Failure | None = None
    """Why the trial failed. Not the error itself, whose traceback would keep the trial's tensors in memory."""
    state: LoopState = field(default_factory=LoopState)
    scores: Scores = field(default_factory=Scores)
    checkpoint: Path | None = None
    trunk_seconds: float = 0.0
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    steady_tokens_per_s: float | None = None
    engine: EngineRecord | None = None
    reduced_execution: ExecutionPlan | None = None
    """The smaller execution with which it was run, where memory ran out."""

    def result(self) -> RungResult:
        """Return the gang's answer; for a failed trial, with the progress that it made."""
        evaluation, retain = self.scores.evaluation, self.scores.retain
        return RungResult(
            trial_id=self.work.trial.trial_id,
            rung=self.work.rung,
            step=self.state.step,
            tokens=self.state.tokens,
            state="failed" if self.failure else "done",
            failure=self.failure,
            train_loss=self.state.loss,
            eval_loss=None if evaluation is None else evaluation.loss,
            metrics=self.scores.metrics,
            retain_loss=None if retain is None else retain.loss,
            retain_accuracy=self.scores.retain_accuracy,
            checkpoint=None if self.checkpoint is None else str(self.checkpoint),
            engine=self.engine,
            reduced_execution=self.reduced_execution,
            steady_tokens_per_s=self.steady_tokens_per_s,
            trunk_seconds=self.trunk_seconds,
            train_seconds=self.train_seconds,
            eval_seconds=self.scores.seconds,
            started_at=self.started_at,
            finished_at=time.time(),
            notes=tuple(self.notes),
        )

    def record_peaks(self, context: HostContext, own_bytes: int) -> None:
        """Record the memory that every rank has used at most. Called on every rank, after the engine was recorded."""
        peaks = context.ranks.gather(own_bytes)
        assert self.engine is not None
        self.engine = self.engine.model_copy(update={"peak_memory_bytes": max(peaks), "rank_peak_memory_bytes": tuple(peaks)})


def forward_record(context: HostContext, work: TrainRung | EvaluateBase, execution: ExecutionPlan, ordinal: int) -> EngineRecord:
    """Return the record of work that only runs the model forward; training adds what its engine is.

    Args:
        ordinal: How many pieces of work the gang had run before.
    """
    return EngineRecord(
        executor="none",
        engine_class="",
        zero_stage=execution.zero_stage,
        ranks=context.ranks.count,
        partitioned_bytes=0,
        trainable_parameters=0,
        peak_memory_bytes=0,
        live_engines=num_live_engines(),
        base_loads=context.base.num_loads,
        base_test=context.base_test,
        ordinal=ordinal,
        device=execution.device,
        predicted_memory_bytes=work.predicted_memory_bytes,
        micro_batch_rows=execution.micro_batch_rows,
        checkpointing=execution.checkpointing,
    )
