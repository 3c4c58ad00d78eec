"""A rank of a gang: the base loaded once, and one trial after another on it."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.data import TokenizedSet
from orchestrator.data.sets import load_known
from orchestrator.errors import (
    OutOfMemoryError,
    RankOutOfMemoryError,
    TrainingError,
)
from orchestrator.train import pulse
from orchestrator.train.adapters.branch import head_name
from orchestrator.train.batches import RowPlan
from orchestrator.train.checkpoint.saving import Saver
from orchestrator.train.engines import deepspeed_engine
from orchestrator.train.engines.construction import forward_ready
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.groups import Groups
from orchestrator.train.integrity import base_fingerprint, changed_base
from orchestrator.train.measure.measurement import Bench, Found, measure_on
from orchestrator.train.memory import first_line, is_out_of_memory, reset_peak
from orchestrator.train.model.base import LoadedBase, load_base, loading_device
from orchestrator.train.model.objective import objective_of
from orchestrator.train.outcome import TRIAL_ERRORS, TrialOutcome, result_of
from orchestrator.train.ranks import Ranks, join_gang, leave_gang
from orchestrator.train.trial import TrialRun
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.work.assignment import EvaluateBase, Measurement, MeasureShift, ScoreBlocks, TrainRung, Work
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.memory_ladder import Relief, nothing_smaller, relieve
from orchestrator.work.results import MeasurementResult, RungResult, StepReport, WorkResult

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class TrainHost:
    """One process of a gang. Every rank makes the same calls in the same order."""

    def __init__(self, base_load: BaseLoad, anatomy: ModelAnatomy, execution: ExecutionPlan, ranks: Ranks) -> None:
        self._execution = execution
        self._ranks = ranks
        dtype = torch.bfloat16 if execution.dtype == "bfloat16" else torch.float32
        load_on = loading_device(base_load, execution, ranks.device)
        self._base = load_base(base_load, anatomy, dtype=dtype, device=ranks.device, load_on=load_on)
        if execution.executor == "deepspeed":
            deepspeed_engine.prepare_base(self._base.model, execution, ranks.device)
        self._fingerprint = base_fingerprint(self._base.model)
        self._sets: dict[str, TokenizedSet] = {}
        self._saver = Saver()
        self._trunk = TrunkLibrary(self._base, self._fingerprint, ranks, self._load_set)
        self._ordinal = 0
        self.news: list[str] = []
        """Told with the next result."""
        self._groups = Groups(self)
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
            anatomy: Of the base's folder.
            execution: How trials are trained here; its `ranks` is `world_size`.
            rank: This process's number.
            world_size: Processes of the gang.
            init_method: Where the ranks meet: `tcp://host:port` or `file:///path`; None where a process group exists.

        Raises:
            TrainingError: the plan and the gang differ in their number of ranks.
            BaseError: the base cannot be loaded.
        """
        pulse.enter("loading the base")
        if execution.executor == "deepspeed":
            deepspeed_engine.load_deepspeed(execution.device)
        return cls(base, anatomy, execution, join_gang(execution, rank, world_size, init_method))

    @property
    def base(self) -> LoadedBase:
        """The base, loaded once."""
        return self._base

    @property
    def ranks(self) -> Ranks:
        """This process among the others."""
        return self._ranks

    def run(
        self,
        assignment: Work,
        on_step: Callable[[StepReport], None] | None = None,
        on_relief: Callable[[ExecutionPlan, str], None] | None = None,
    ) -> WorkResult:
        """Do the work: carry a trial to its next rung, on disk. A trial's own failure is a result with the reason, on every rank.

        Args:
            assignment: What to do.
            on_step: Called after each step, on every rank.
            on_relief: Called where memory ran out, on every rank, with the smaller way and the note about it, before the
                trial starts again from `assignment.start` by it.

        Raises:
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it: this gang must be replaced.
            BaseLostError: the base could not be put back as it was: this gang must be replaced.
            Exception: whatever else breaks the gang itself (a lost rank, a full disk).
        """
        if isinstance(assignment, TrainRung | EvaluateBase):
            return self.run_trial(assignment, on_step, on_relief)
        return self.measure(assignment)

    def run_trial(
        self,
        assignment: TrainRung | EvaluateBase,
        on_step: Callable[[StepReport], None] | None = None,
        on_relief: Callable[[ExecutionPlan, str], None] | None = None,
    ) -> RungResult:
        """Train a trial to its next rung, or evaluate the base; see `run`."""
        result = self.carry_trial(assignment, on_step, on_relief)
        self.settle()
        return result.model_copy(update={"finished_at": time.time()})

    def carry(self, assignment: Work, on_step: Callable[[StepReport], None] | None = None) -> WorkResult:
        """As `run`, but the rung may be on its way to the disk still: the result counts after `settle`."""
        if isinstance(assignment, TrainRung | EvaluateBase):
            return self.carry_trial(assignment, on_step)
        return self.measure(assignment)

    def measure(self, assignment: Measurement) -> MeasurementResult:
        """Measure; a failure of the measurement itself is a result with the reason, on every rank."""
        pulse.enter("preparing")
        notes = [*self.news]
        self.news.clear()

        def attempt(execution: ExecutionPlan) -> Found:
            return measure_on(
                assignment, Bench(self._base, execution, self._ranks, self._load_set, self._trunk, self._fingerprint)
            )

        try:
            self.open_trunk(assignment, notes.append)
            result = MeasurementResult(work_id=assignment.work_id, found=self._in_memory(attempt, assignment, notes))
        except TRIAL_ERRORS as error:
            result = assignment.failed(str(error))
            logger.warning("%s failed: %s", assignment.work_id, error)
        self.finish(assignment)
        return result.model_copy(update={"notes": tuple(notes)})

    def carry_trial(
        self,
        assignment: TrainRung | EvaluateBase,
        on_step: Callable[[StepReport], None] | None = None,
        on_relief: Callable[[ExecutionPlan, str], None] | None = None,
    ) -> RungResult:
        """Train a trial to its next rung, or evaluate the base; the result counts after `settle`."""
        started = time.time()
        pulse.enter("preparing")
        notes = [*self.news]
        self.news.clear()
        outcome, reason = TrialOutcome(), ""
        trunk_seconds = 0.0

        def attempt(execution: ExecutionPlan) -> None:
            outcome.relieved = execution if execution is not assignment.execution else None
            self.trial_run(assignment, execution, notes, outcome).run(on_step)

        try:
            trunk_seconds = self.open_trunk(assignment, notes.append)
            self._in_memory(attempt, assignment, notes, on_relief)
        except TRIAL_ERRORS as error:
            reason = str(error)
            logger.warning("trial %s failed: %s", assignment.trial.trial_id, reason)
        self.finish(assignment)
        result = result_of(assignment, outcome, reason)
        update = {"started_at": started, "finished_at": time.time(), "notes": tuple(notes), "trunk_seconds": trunk_seconds}
        return result.model_copy(update=update)

    def open_trunk(self, assignment: Work, note: Callable[[str], None]) -> float:
        """Seconds spent on hidden states that were not stored yet."""
        plan, execution = assignment.trunk, self._execution
        if plan is None:
            return 0.0
        rows = RowPlan.of(execution, self._ranks.rank, classify=self._base.load.task == "classify")
        head = self._base.model.get_submodule(head_name(self._base).rpartition(".")[0])
        objective = objective_of(self._base, head)
        with forward_ready(objective, execution):
            partitioned = is_partitioned(execution)
            pulse.enter("caching activations")
            return self._trunk.open(plan, assignment.data, rows, objective, partitioned=partitioned, note=note)

    def run_group(self, group: Sequence[Work], on_step: Callable[[StepReport], None] | None = None) -> list[WorkResult]:
        """Carry trials that may share a batch (`plan.fusing`) to their next rung, as many in one as pays on this machine.

        Their rungs may be on their way to the disk still when it returns, and the next group may begin: an answer counts
        after a `settle` that was called later.

        Args:
            group: What to do. Answers come in no particular order.
            on_step: Called after each step of each trial.

        Raises:
            As `run`.
        """
        results = self._groups.run(group, on_step)
        pulse.enter("idle")
        return results

    def settle(self) -> None:
        """Until every checkpoint that was made so far stands. Any thread may call it.

        Raises:
            Exception: one could not be written: this gang must be replaced.
        """
        self._saver.settle()

    def give_up_held(self) -> bool:
        """Whether any rank held checkpoints that waited to be written, or states of other trials; now none does. Called on every
        rank, where memory ran out: a trial must not come down to less for what its gang has run before."""
        return any(self._ranks.gather(self._saver.give_up()))

    def _in_memory(
        self,
        attempt: Callable[[ExecutionPlan], Answer],
        assignment: Work,
        notes: list[str],
        on_relief: Callable[[ExecutionPlan, str], None] | None = None,
    ) -> Answer:
        """Attempt the work, one step down (`work.memory_ladder`) each time memory runs out and every rank knows.

        Raises:
            OutOfMemoryError: on every rank alike, when memory use cannot be reduced further.
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it.
        """
        self._check_fits(assignment.execution)
        pulse.enter("preparing")
        execution = assignment.execution
        while True:
            reset_peak(self._ranks.device)
            try:
                return attempt(execution)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.check_shared(error)
                relief = None if self.give_up_held() else self._smaller(execution, error)
            # Collected out here: the error's traceback holds everything that the attempt had in memory.
            gc.collect()
            if relief is None:
                notes.append("out of memory: cached state of other rungs is released, and the trial is restarted")
                continue
            execution = relief.execution
            notes.append(f"out of memory: {relief.sentence}")
            self._saver.settle()  # nothing of the larger way is written once it has been left
            if on_relief is not None:
                on_relief(execution, notes[-1])

    def _smaller(self, execution: ExecutionPlan, error: BaseException) -> Relief:
        """Return the next step down.

        Raises:
            OutOfMemoryError: there is none.
        """
        relief = relieve(execution)
        if relief is None:
            raise nothing_smaller(f"out of memory: {first_line(error)}", execution) from None
        return relief

    def trial_run(
        self,
        assignment: TrainRung | EvaluateBase,
        execution: ExecutionPlan,
        notes: list[str],
        outcome: TrialOutcome,
        num_fused: int = 1,
    ) -> TrialRun:
        return TrialRun(
            self._base,
            assignment,
            execution,
            self._ranks,
            self._load_set,
            self._trunk,
            self._saver,
            self._fingerprint,
            self._ordinal,
            notes.append,
            outcome,
            num_fused,
        )

    def check_shared(self, error: BaseException) -> None:
        """Memory ran out: every rank must know before it goes on.

        Raises:
            RankOutOfMemoryError: the others wait for this one.
        """
        if not self._is_shared(error):
            raise RankOutOfMemoryError(f"out of memory on rank {self._ranks.rank}: {first_line(error)}") from error

    def _is_shared(self, error: BaseException) -> bool:
        """Whether every rank knows that memory ran out; with one rank also outside the training rounds."""
        return isinstance(error, OutOfMemoryError) or self._ranks.count == 1

    def _check_fits(self, execution: ExecutionPlan) -> None:
        """The base lies in memory for one kind of gang."""
        if execution.gang_kind != self._execution.gang_kind:
            raise TrainingError(
                f"this gang cannot train with {execution.executor} ZeRO-{execution.zero_stage} on {execution.ranks} ranks",
                expected=f"{self._execution.executor} ZeRO-{self._execution.zero_stage} on {self._execution.ranks} ranks",
            )

    def _load_set(self, path: str) -> TokenizedSet:
        """A tokenised set, read once per process."""
        if path not in self._sets:
            self._sets[path] = load_known(Path(path))
        return self._sets[path]

    def finish(self, *assignments: Work) -> None:
        """One more was run, alone or fused; the base is as it was.

        Raises:
            TrainingError: it is not: this gang must be replaced.
        """
        self._ordinal += 1
        for assignment in assignments:
            if not isinstance(assignment, ScoreBlocks | MeasureShift):  # nothing learns in these
                self._check_base(assignment.selection, assignment.work_id)

    def _check_base(self, selection: LayerSelection, work_id: str) -> None:
        """What was trained was put back; the frozen rest was proven before the branch closed."""
        names = frozenset((*selection.trainable, *selection.adapted))
        moved = changed_base(self._base.model, self._fingerprint, names)
        (count,) = self._ranks.sum([len(moved)])
        if count:
            raise TrainingError(
                f"the base was not restored after trial {work_id}: {count:.0f} tensors differ",
                where=moved[0] if moved else "on another rank",
                remedy="this gang must be replaced",
            )

    def close(self) -> None:
        """Leave the gang, once everything stands that it made."""
        self._saver.close()
        self._trunk.close()
        gc.unfreeze()
        leave_gang()
