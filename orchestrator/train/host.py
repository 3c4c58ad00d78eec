"""A rank of a gang: the base loaded once, and one trial after another on it."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.data import TokenizedSet
from orchestrator.errors import (
    DataError,
    IntegrityError,
    OutOfMemoryError,
    RankOutOfMemoryError,
    SelectionError,
    TrainingError,
    UsageError,
)
from orchestrator.plan.relief import nothing_smaller, relieve
from orchestrator.plan.values import Assignment, BaseLoad, ExecutionPlan, RungResult, StepReport
from orchestrator.train.base import load_base, loading_device
from orchestrator.train.integrity import base_fingerprint, changed_base
from orchestrator.train.memory import first_line, is_out_of_memory, reset_peak
from orchestrator.train.ranks import Ranks
from orchestrator.train.trial import TrialOutcome, TrialRun

TRIAL_ERRORS = (TrainingError, SelectionError, IntegrityError, UsageError, DataError)
"""What a trial may fail by while the gang stays whole: raised on every rank alike."""
logger = logging.getLogger(__name__)


class TrainHost:
    """One process of a gang. Every rank makes the same calls in the same order."""

    def __init__(self, base_load: BaseLoad, anatomy: ModelAnatomy, execution: ExecutionPlan, ranks: Ranks) -> None:
        self._execution = execution
        self._ranks = ranks
        dtype = torch.bfloat16 if execution.dtype == "bfloat16" else torch.float32
        load_on = loading_device(base_load, execution, ranks.device)
        self._base = load_base(base_load, anatomy, dtype=dtype, device=ranks.device, load_on=load_on)
        if execution.executor == "deepspeed":
            from orchestrator.train import deepspeed_engine

            deepspeed_engine.prepare_base(self._base.model, execution, ranks.device)
        self._fingerprint = base_fingerprint(self._base.model)
        self._sets: dict[str, TokenizedSet] = {}
        self._ordinal = 0
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
        if execution.ranks != world_size:
            raise TrainingError(f"the plan has {execution.ranks} ranks and the gang {world_size}")
        if execution.executor == "torch" and world_size > 1:
            raise TrainingError("the torch executor is for one rank", expected="executor: deepspeed")
        torch.set_num_threads(execution.threads_per_rank)
        torch.use_deterministic_algorithms(True, warn_only=True)
        import_module("torch.utils.deterministic").fill_uninitialized_memory = False  # type: ignore[attr-defined]
        device = _device(execution)
        if world_size > 1 or execution.executor == "deepspeed":
            _join(execution, rank, world_size, init_method)
        return cls(base, anatomy, execution, Ranks(rank, world_size, device))

    @property
    def ranks(self) -> Ranks:
        """This process among the others."""
        return self._ranks

    def run(
        self,
        assignment: Assignment,
        on_step: Callable[[StepReport], None] | None = None,
        on_relief: Callable[[ExecutionPlan, str], None] | None = None,
    ) -> RungResult:
        """Carry the trial to its next rung. A trial's own failure is a result with the reason, on every rank.

        Args:
            assignment: What to do.
            on_step: Called after each step, on every rank.
            on_relief: Called where memory ran out, on every rank, with the smaller way and the note about it, before the
                trial starts again from `assignment.start` by it.

        Raises:
            TrainingError: the base could not be put back as it was: this gang must be replaced.
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it: this gang must be replaced.
            BaseLostError: the base could not be put back as it was: this gang must be replaced.
            Exception: whatever else breaks the gang itself (a lost rank, a full disk).
        """
        started = time.time()
        notes: list[str] = []
        outcome, reason = TrialOutcome(), ""
        try:
            self._run_in_memory(assignment, on_step, on_relief, notes, outcome)
        except TRIAL_ERRORS as error:
            reason = str(error)
            logger.warning("trial %s failed: %s", assignment.trial.trial_id, reason)
        self._ordinal += 1
        self._check_base(assignment)
        result = _result(assignment, outcome, reason)
        return result.model_copy(update={"started_at": started, "finished_at": time.time(), "notes": tuple(notes)})

    def _run_in_memory(
        self,
        assignment: Assignment,
        on_step: Callable[[StepReport], None] | None,
        on_relief: Callable[[ExecutionPlan, str], None] | None,
        notes: list[str],
        outcome: TrialOutcome,
    ) -> None:
        """Run it, one step down (`plan.relief`) each time memory runs out and every rank knows.

        Raises:
            OutOfMemoryError: on every rank alike, when nothing smaller is left.
            RankOutOfMemoryError: memory ran out on this rank while the others wait for it.
        """
        self._check_fits(assignment.execution)
        execution = assignment.execution
        while True:
            reset_peak(self._ranks.device)
            run = TrialRun(
                self._base,
                assignment,
                execution,
                self._ranks,
                self._load_set,
                self._fingerprint,
                self._ordinal,
                notes.append,
                outcome,
            )
            try:
                return run.run(on_step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self._is_shared(error):
                    raise RankOutOfMemoryError(f"out of memory on rank {self._ranks.rank}: {first_line(error)}") from error
                relief = relieve(execution)
                if relief is None:
                    raise nothing_smaller(f"out of memory: {first_line(error)}", execution) from None
            execution = outcome.relieved = relief.execution
            notes.append(f"out of memory: {relief.sentence}")
            del run
            gc.collect()
            if on_relief is not None:
                on_relief(execution, notes[-1])

    def _is_shared(self, error: BaseException) -> bool:
        """Whether every rank knows that memory ran out; with one rank also outside the training rounds."""
        return isinstance(error, OutOfMemoryError) or self._ranks.count == 1

    def _check_fits(self, execution: ExecutionPlan) -> None:
        """The base lies in memory for one kind of execution; stages 0 to 2 share it."""
        kind = ("device", "ranks", "executor", "dtype")
        partitioned = [plan.zero_stage == 3 and plan.executor == "deepspeed" for plan in (execution, self._execution)]
        if partitioned[0] != partitioned[1] or any(getattr(execution, k) != getattr(self._execution, k) for k in kind):
            raise TrainingError(
                f"this gang cannot train with {execution.executor} ZeRO-{execution.zero_stage} on {execution.ranks} ranks",
                expected=f"{self._execution.executor} ZeRO-{self._execution.zero_stage} on {self._execution.ranks} ranks",
            )

    def _load_set(self, path: str) -> TokenizedSet:
        """A tokenised set, read once per process."""
        if path not in self._sets:
            self._sets[path] = TokenizedSet.load(Path(path))
        return self._sets[path]

    def _check_base(self, assignment: Assignment) -> None:
        """What learned was put back; the frozen rest was proven before the branch closed."""
        names = frozenset((*assignment.selection.trainable, *assignment.selection.adapted))
        moved = changed_base(self._base.model, self._fingerprint, names)
        (count,) = self._ranks.sum([len(moved)])
        if count:
            raise TrainingError(
                f"the base was not put back after trial {assignment.trial.trial_id}: {count:.0f} tensors differ",
                where=moved[0] if moved else "on another rank",
                remedy="this gang must be replaced",
            )

    def close(self) -> None:
        """Leave the gang."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _result(assignment: Assignment, outcome: TrialOutcome, reason: str) -> RungResult:
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
        checkpoint=None if outcome.checkpoint is None else str(outcome.checkpoint),
        engine=outcome.engine,
        layer_scores=outcome.layer_scores,
        relieved=outcome.relieved,
        steady_tokens_per_s=outcome.steady_tokens_per_s,
        train_seconds=outcome.train_seconds,
        eval_seconds=outcome.scores.seconds,
    )


def _device(execution: ExecutionPlan) -> torch.device:
    """This process's GPU (the one it sees, or its LOCAL_RANK's), or the CPU."""
    if execution.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("the plan trains on GPUs and this process sees none")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need
    index = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _join(execution: ExecutionPlan, rank: int, world_size: int, init_method: str | None) -> None:
    """Make the process group where there is none, and set what DeepSpeed reads from the environment."""
    place = urlparse(init_method or "")
    defaults = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": place.hostname or "127.0.0.1",
        "MASTER_PORT": str(place.port or 29500),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not dist.is_initialized():
        dist.init_process_group(execution.backend, init_method=init_method, rank=rank, world_size=world_size)
