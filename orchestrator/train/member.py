"""One trial of a training session on this rank: its engine, where it continues from, its steps, checkpoints and record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.store import append_jsonl
from orchestrator.train import heartbeat
from orchestrator.train.adapters.artifacts import load_artifact, misfit
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.checkpoint.resume import (
    StartPoint,
    Wanted,
    checkpoint_folder,
    forget_steps_after,
    open_checkpoint,
    rung_folder,
)
from orchestrator.train.checkpoint.snapshot import take_snapshot
from orchestrator.train.context import HostContext
from orchestrator.train.engines.engine import Engine, is_partitioned, layout_of
from orchestrator.train.engines.zero3_warm import assign_whole
from orchestrator.train.head_fit import start_from_fit, starts_from_fit
from orchestrator.train.loop import LoopState, LoopTrial, SteadySpeed
from orchestrator.train.memory import growth_bytes, memory_in_use
from orchestrator.train.model.objective import Objective
from orchestrator.train.outcome import TrialOutcome, forward_record
from orchestrator.train.training_sets import TrainingSets
from orchestrator.train.trial_engine import build_engine
from orchestrator.work.assignment import TrainRung, owner_of
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.results import StepReport

OnStep = Callable[[StepReport], None] | None


@dataclass(frozen=True)
class SessionSetup:
    """The settings with which a session runs all of its trials."""

    context: HostContext
    execution: ExecutionPlan
    """Smaller than planned where memory ran out."""
    ordinal: int
    """Number of pieces of work that the gang had run before."""
    num_members: int
    """Trials that share the session's batches."""


@dataclass
class Member:
    """A trial of a running session. Every rank has one and makes the same calls in the same order."""

    setup: SessionSetup
    outcome: TrialOutcome[TrainRung]
    sets: TrainingSets
    branch: Branch
    engine: Engine
    from_memory: bool
    """True if it continues from the state of its last rung that this process holds in memory."""
    _peak_bytes: int = 0
    _speed: SteadySpeed = field(default_factory=lambda: SteadySpeed(0))

    @property
    def _folder(self) -> Path:
        return Path(self.outcome.work.folder)

    def begin(self, on_step: OnStep) -> LoopTrial:
        """Return the trial for the loop. Lines of steps that are about to be taken again are removed from steps.jsonl.

        Args:
            on_step: Called after each step, when it is recorded and its checkpoint is made.
        """
        state, work = self.outcome.state, self.outcome.work
        self._speed = SteadySpeed(state.tokens)
        if self.setup.context.ranks.first:
            forget_steps_after(state.step, self._folder / "steps.jsonl")

        def after_step(report: StepReport, state: LoopState) -> None:
            self._record_step(report, state)
            every = work.checkpoint_every_steps
            if every and state.step % every == 0 and state.step < work.stop_step:
                self._save(checkpoint_folder(self._folder, state.step), final=False)
            if on_step is not None:
                on_step(report)

        return LoopTrial(self.engine, work.trial, work.settings, after_step, state)

    def _record_step(self, report: StepReport, state: LoopState) -> None:
        self._speed.add(report)
        self.outcome.steady_tokens_per_s = self._speed.tokens_per_s
        self._peak_bytes = max(self._peak_bytes, report.memory_bytes)
        self.outcome.state = state
        if self.setup.context.ranks.first:
            append_jsonl(self._folder / "steps.jsonl", report)

    def record_engine(self) -> None:
        """Record which engine serves the trial."""
        work, execution, num_members = self.outcome.work, self.setup.execution, self.setup.num_members
        update = {
            "executor": execution.executor,
            "engine_class": self.engine.name,
            "partitioned_bytes": self.engine.state_bytes,
            "trainable_parameters": work.selection.num_trainable_parameters,
            # The plan's figure is for a trial that has the gang to itself.
            "predicted_memory_bytes": work.predicted_memory_bytes if num_members == 1 else None,
            "fused_trials": num_members,
            "from_memory": self.from_memory,
            "compiled": execution.compiled,
            "compile_seconds": self.outcome.compile_seconds,
            "trunk_cut": None if self.sets.states is None else work.selection.cut,
        }
        record = forward_record(self.setup.context, work, execution, self.setup.ordinal)
        self.outcome.engine = record.model_copy(update=update)

    def record_peaks(self) -> None:
        """Record the memory that every rank has used so far. Called on every rank."""
        context = self.setup.context
        self.outcome.record_peaks(context, max(self._peak_bytes, memory_in_use(context.ranks.device)))

    def save_rung(self) -> None:
        """Save what the next rung continues from and what promotion takes."""
        folder = rung_folder(self._folder, self.outcome.work.rung)
        self._save(folder, final=True)
        self.outcome.checkpoint = folder

    def _save(self, folder: Path, *, final: bool) -> None:
        heartbeat.enter("saving")
        work, execution = self.outcome.work, self.setup.execution
        ranks, saver = self.setup.context.ranks, self.setup.context.saver
        together = execution.executor == "deepspeed"  # each rank writes its own partition
        snapshot = take_snapshot(
            self.branch,
            self.engine,
            self.outcome.state,
            ranks,
            seed=work.trial.seed,
            layout=layout_of(execution),
            keep_optimizer=work.keep_optimizer or not final,
            evaluations=self.outcome.scores.by_set() if final else {},
            gathered=not together,
            owner=owner_of(work),
        )
        growth = growth_bytes(ranks.device, work.largest_memory_bytes, saver.held_bytes + snapshot.num_bytes)
        saver.save(folder, snapshot, ranks, together=together, rung=final, growth_bytes=growth, num_gangs=work.num_gangs)


def open_member(setup: SessionSetup, outcome: TrialOutcome[TrainRung], branch: Branch, objective: Objective) -> Member:
    """Build the trial's engine, in the state of its last checkpoint where it continues from one.

    The engine is built while the branch holds the base's own weights, for anchors pull towards those. Of a checkpoint that
    another kind of gang wrote, only the weights are loaded.
    """
    sets = TrainingSets(outcome.work, setup.context.sets.load, setup.context.trunk)
    start = _start_point(setup, outcome, branch)
    if start is None and starts_from_fit(branch, outcome.work.trial.control):
        # Before the engine, which copies its master weights.
        outcome.notes.append(start_from_fit(setup.context, setup.execution, sets, branch, objective))
    engine = build_engine(setup.context, setup.execution, sets, objective, branch)
    try:
        if start is not None and start.exact:
            start.resume(engine, setup.context.ranks)
        elif start is not None:
            _load_weights(branch, start.folder, setup.execution)
            # The engine copied its master weights before the checkpoint's weights were loaded.
            engine.refresh_masters()
    except BaseException:
        # The session closes members that it was given; this one never reaches it.
        engine.close()
        raise
    outcome.state = start.state if start is not None else LoopState()
    member = Member(setup, outcome, sets, branch, engine, start is not None and start.remembered is not None)
    member.record_engine()
    return member


def _start_point(setup: SessionSetup, outcome: TrialOutcome[TrainRung], branch: Branch) -> StartPoint | None:
    """Return where the trial continues: a whole checkpoint of its own that fits the freshly opened branch."""
    work, saver = outcome.work, setup.context.saver
    if work.start is None:
        return None
    start, folder, seed, layout = Path(work.start), Path(work.folder), work.trial.seed, layout_of(setup.execution)
    remembered = saver.find(start, seed=seed, layout=layout)
    if remembered is not None:
        return remembered
    # The trial's last checkpoint may still be in the queue of the writing thread.
    saver.settle(folder)
    wanted = Wanted(seed, layout, owner_of(work), lambda found: misfit(branch, found))
    return open_checkpoint(start, folder, setup.context.ranks, wanted, note=outcome.notes.append)


def _load_weights(branch: Branch, folder: Path, execution: ExecutionPlan) -> None:
    if is_partitioned(execution):
        load_artifact(branch, folder, assign_whole)
    else:
        load_artifact(branch, folder)
