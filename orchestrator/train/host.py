"""A rank of a gang: the base loaded once, and one piece of work after another on it."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.bases import folder_on_this_node
from orchestrator.errors import OrchestratorError, TrainingError
from orchestrator.train import heartbeat
from orchestrator.train.context import HostContext
from orchestrator.train.engines import deepspeed_engine
from orchestrator.train.fused_batch import FusedBatchSizes
from orchestrator.train.integrity import base_fingerprint, changed_base
from orchestrator.train.measure.measurement import Found, measure
from orchestrator.train.memory import is_out_of_memory, reset_peak
from orchestrator.train.memory_retry import OnReduced, check_shared, run_within_memory
from orchestrator.train.model.base import load_base, loading_device
from orchestrator.train.outcome import TRIAL_ERRORS, TrialOutcome
from orchestrator.train.ranks import Ranks, join_gang, leave_gang
from orchestrator.train.session import TrainingSession, evaluate_base
from orchestrator.train.ways import check_ways
from orchestrator.work.assignment import EvaluateBase, Measurement, MeasureShift, ScoreBlocks, TrainRung, Work
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.results import MeasurementResult, RungResult, StepReport, WorkResult

logger = logging.getLogger(__name__)
OnStep = Callable[[StepReport], None] | None


class TrainHost:
    """One process of a gang. Every rank makes the same calls in the same order."""

    def __init__(self, base_load: BaseLoad, anatomy: ModelAnatomy, execution: ExecutionPlan, ranks: Ranks) -> None:
        dtype = torch.bfloat16 if execution.dtype == "bfloat16" else torch.float32
        load_on = loading_device(base_load, execution, ranks.device)
        base = load_base(base_load, anatomy, dtype=dtype, device=ranks.device, load_on=load_on)
        if execution.executor == "deepspeed":
            deepspeed_engine.prepare_base(base.model, execution, ranks.device)
        context = HostContext.create(base, base_fingerprint(base.model), execution, ranks)
        self.context = replace(context, base_test=check_ways(context))
        self.batch_sizes = FusedBatchSizes(self.context)
        self._ordinal = 0
        """Number of pieces of work that were run before."""
        self._news: list[str] = []
        """Notes for the next result."""
        # The base lives as long as the process. Frozen, it is left out of the many collections between trials.
        gc.collect()
        gc.freeze()

    @classmethod
    def create(
        cls,
        base: BaseLoad,
        anatomy: ModelAnatomy,
        execution: ExecutionPlan,
        rank: int,
        world_size: int,
        init_method: str | None,
    ) -> TrainHost:
        """Join the gang and load the base, once.

        Args:
            base: How to load the base.
            anatomy: Anatomy of the base's folder.
            execution: How trials are trained here; its `ranks` is `world_size`.
            rank: This process's number.
            world_size: Processes of the gang.
            init_method: Where the ranks meet: `tcp://host:port` or `file:///path`; None where a process group exists.

        Raises:
            TrainingError: the plan and the gang differ in their number of ranks.
            BaseError: the base cannot be loaded.
        """
        heartbeat.enter("loading the base")
        base = base.model_copy(update={"folder": str(folder_on_this_node(base))})
        # Before the process group exists: see `load_deepspeed`.
        if execution.executor == "deepspeed":
            deepspeed_engine.load_deepspeed(execution.device)
        return cls(base, anatomy, execution, join_gang(execution, rank, world_size, init_method))

    @property
    def ranks(self) -> Ranks:
        """Return the ranks of this process's gang."""
        return self.context.ranks

    def run(self, work: Work, on_step: OnStep = None, on_reduced: OnReduced | None = None) -> WorkResult:
        """Do the work: `run_trial` for a trial, `measure` for a measurement."""
        if isinstance(work, TrainRung | EvaluateBase):
            return self.run_trial(work, on_step, on_reduced)
        return self.measure(work)

    def run_trial(
        self, work: TrainRung | EvaluateBase, on_step: OnStep = None, on_reduced: OnReduced | None = None
    ) -> RungResult:
        """Train a trial to its next rung, on disk, or evaluate the base. A trial's own failure is a result with the reason.

        Args:
            work: What to do.
            on_step: Called after each step, on every rank.
            on_reduced: Called where memory ran out, on every rank, with the smaller execution and the note about it, before
                the trial is restarted from `work.start`.

        Raises:
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it: this gang must be replaced.
            BaseLostError: the base could not be restored: this gang must be replaced.
            Exception: whatever else breaks the gang itself (a lost rank, a full disk).
        """
        result = self._train_or_evaluate(work, on_step, on_reduced)
        self.settle()
        return result.model_copy(update={"finished_at": time.time()})

    def measure(self, work: Measurement) -> MeasurementResult:
        """Measure. A failure of the measurement itself is a result with the reason, on every rank.

        Raises:
            Exception: as `run_trial`.
        """
        heartbeat.enter("preparing")
        notes = self._take_news()

        def attempt(execution: ExecutionPlan) -> Found:
            return measure(work, self.context, execution)

        try:
            self.context.open_trunk(work.trunk, work.data, notes.append)
            self._check_gang(work.execution)
            # Opening the trunk may have entered a phase of its own.
            heartbeat.enter("preparing")
            found = run_within_memory(self.context, attempt, work.execution, notes)
            result = MeasurementResult(work_id=work.work_id, found=found)
        except TRIAL_ERRORS as error:
            result = work.failed(Failure.of(error))
            logger.warning("%s failed: %s", work.work_id, error)
        self._finish(work)
        return result.model_copy(update={"notes": tuple(notes)})

    def run_group(self, group: Sequence[Work], on_step: OnStep = None) -> list[WorkResult]:
        """Do the work of a group: trials that may share a batch (`plan.fusing`), or a single piece of any kind.

        As many trials are trained in one batch as is fastest on this machine. Their rungs may still be being written when
        it returns, and the next group may begin: a result counts after a `settle` that was called later.

        Args:
            group: What to do. Results come in no particular order.
            on_step: Called after each step of each trial.

        Raises:
            Exception: as `run_trial`.
        """
        rungs = [work for work in group if isinstance(work, TrainRung)]
        results: list[WorkResult]
        if len(rungs) == len(group):
            results = [*self._run_rungs(rungs, on_step)]
        else:  # only rungs can share a batch
            results = [
                self._train_or_evaluate(work, on_step) if isinstance(work, TrainRung | EvaluateBase) else self.measure(work)
                for work in group
            ]
        heartbeat.enter("idle")
        return results

    def settle(self) -> None:
        """Wait until every checkpoint that was made so far is on disk. May be called by any thread.

        Raises:
            Exception: one could not be written: this gang must be replaced.
        """
        self.context.saver.settle()

    def close(self) -> None:
        """Leave the gang, once everything that it made is on disk."""
        self.context.saver.close()
        self.context.trunk.close()
        # What was frozen may hold the process group, whose threads have to end before Python does: see `leave_gang`.
        gc.unfreeze()
        leave_gang()

    def _train_or_evaluate(
        self,
        work: TrainRung | EvaluateBase,
        on_step: OnStep = None,
        on_reduced: OnReduced | None = None,
        started_at: float | None = None,
    ) -> RungResult:
        """Do a trial's work. Its rung may still be being written: the result counts after `settle`."""
        started_at = started_at or time.time()
        if isinstance(work, TrainRung):
            rung = TrialOutcome(work, self._take_news(), started_at)

            def train(execution: ExecutionPlan) -> None:
                TrainingSession(self.context, [rung], execution, self._ordinal).run(on_step)

            return self._fill(rung, train, on_reduced)
        base = TrialOutcome(work, self._take_news(), started_at)
        return self._fill(base, lambda execution: evaluate_base(self.context, base, execution, self._ordinal), on_reduced)

    def _fill(
        self,
        outcome: TrialOutcome[TrainRung] | TrialOutcome[EvaluateBase],
        run: Callable[[ExecutionPlan], None],
        on_reduced: OnReduced | None,
    ) -> RungResult:
        """Have `run` fill the outcome, with a smaller execution where memory runs out, and return its result."""
        work = outcome.work

        def attempt(execution: ExecutionPlan) -> None:
            outcome.reduced_execution = execution if execution is not work.execution else None
            run(execution)

        heartbeat.enter("preparing")
        try:
            outcome.trunk_seconds = self.context.open_trunk(work.trunk, work.data, outcome.notes.append)
            self._check_gang(work.execution)
            heartbeat.enter("preparing")
            run_within_memory(self.context, attempt, work.execution, outcome.notes, on_reduced)
        except TRIAL_ERRORS as error:
            outcome.failure = Failure.of(error)
        if outcome.failure:
            logger.warning("trial %s failed: %s", work.trial.trial_id, outcome.failure)
        self._finish(work)
        return outcome.result()

    def _run_rungs(self, group: Sequence[TrainRung], on_step: OnStep) -> list[RungResult]:
        """Train the trials, batch after batch."""
        group = sorted(group, key=lambda work: (work.trial.lora_rank or 0, work.trial.adapter.kind))  # equal adapters are stacked
        results: list[RungResult] = []
        while len(results) < len(group):
            rest = group[len(results) :]
            started_at = time.time()
            batch = rest[: self.batch_sizes.choose(rest, self._news.append)]
            if len(batch) == 1:
                results.append(self._train_or_evaluate(batch[0], on_step, started_at=started_at))
            else:
                results += self._run_fused(batch, started_at, on_step)
        return results

    def _run_fused(self, group: Sequence[TrainRung], started_at: float, on_step: OnStep) -> list[RungResult]:
        """Train the trials in one batch; in halves where memory runs out, separately where the batch fails for another reason."""
        news = self._take_news()
        outcomes = [TrialOutcome(work, started_at=started_at) for work in group]
        try:
            trunk_seconds = self.context.open_trunk(group[0].trunk, group[0].data, news.append)
            heartbeat.enter("preparing")
            reset_peak(self.ranks.device)
            TrainingSession(self.context, outcomes, group[0].execution, self._ordinal).run(on_step)
        except (*TRIAL_ERRORS, RuntimeError, MemoryError) as error:
            self._news += news
            separately = self._shrink_batch(group, error)
        else:
            self._finish(*group)
            outcomes[0].notes = [*news, *outcomes[0].notes]
            for outcome in outcomes:
                outcome.trunk_seconds = trunk_seconds / len(group)
            return [outcome.result() for outcome in outcomes]
        # Restarted out here: inside the handler the error's traceback still holds the tensors of the batch.
        gc.collect()
        if separately:
            return [self._train_or_evaluate(work, on_step) for work in group]
        return self._run_rungs(group, on_step)

    def _shrink_batch(self, group: Sequence[TrainRung], error: Exception) -> bool:
        """Decide how trials that failed in one batch are trained, each from where it began.

        Returns:
            Whether each is trained separately; otherwise in batches again, smaller ones unless memory was released.

        Raises:
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it.
            Exception: `error`, where it is neither a trial's own nor out of memory.
        """
        if is_out_of_memory(error):
            check_shared(self.ranks, error)
            if self.context.release_cached_state():
                self._news.append("out of memory: cached state of other rungs is released, and the batch is restarted")
                return False
            size = len(group) // 2
            self.batch_sizes.limit(group[0], size)
            self._news.append(f"out of memory: trials per batch reduced from {len(group)} to {size}")
            return False
        if not isinstance(error, OrchestratorError):
            raise error
        self._news.append(f"{len(group)} trials cannot share a batch and are run separately: {error}")
        return True

    def _take_news(self) -> list[str]:
        """Return the notes for the next result; they are reported once."""
        news, self._news = self._news, []
        return news

    def _check_gang(self, execution: ExecutionPlan) -> None:
        """Raise TrainingError where the base was loaded for another kind of gang.

        How optimizer state is offloaded and how rows are filled does not concern the loaded base: each trial may have its own.
        """
        own = self.context.execution
        per_trial = {"offload": own.offload, "row_tokens": own.row_tokens, "pack": own.pack}
        if execution.model_copy(update=per_trial).gang_kind != own.gang_kind:
            raise TrainingError(
                f"this gang cannot train with {execution.executor} ZeRO-{execution.zero_stage} on {execution.ranks} ranks",
                expected=f"{own.executor} ZeRO-{own.zero_stage} on {own.ranks} ranks",
            )

    def _finish(self, *group: Work) -> None:
        """Count the work and check that it left the base as it was.

        Raises:
            TrainingError: it did not: this gang must be replaced.
        """
        self._ordinal += 1
        for work in group:
            if not isinstance(work, ScoreBlocks | MeasureShift):  # nothing is trainable in these
                self._check_base(work.selection, work.work_id)

    def _check_base(self, selection: LayerSelection, work_id: str) -> None:
        """Check what was trainable; the frozen rest was checked before the branch closed (law 2)."""
        names = frozenset((*selection.trainable, *selection.adapted))
        moved = changed_base(self.context.base.model, self.context.fingerprint, names)
        (count,) = self.ranks.sum([len(moved)])
        if count:
            raise TrainingError(
                f"the base was not restored after trial {work_id}: {count:.0f} tensors differ",
                where=moved[0] if moved else "on another rank",
                remedy="this gang must be replaced",
            )
