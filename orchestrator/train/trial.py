"""A trial on one rank: open the branch, train, evaluate, prove that nothing frozen moved, save, close."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from orchestrator.data import TokenizedSet
from orchestrator.store import append_jsonl
from orchestrator.train import pulse
from orchestrator.train.adapters.artifacts import load_artifact, misfit
from orchestrator.train.adapters.branch import Branch, open_branch
from orchestrator.train.batches import RowPlan
from orchestrator.train.building import build_engine
from orchestrator.train.checkpoint.resume import (
    StartPoint,
    Wanted,
    checkpoint_folder,
    forget_steps_after,
    open_checkpoint,
    rung_folder,
)
from orchestrator.train.checkpoint.saving import Saver
from orchestrator.train.checkpoint.snapshot import take_snapshot
from orchestrator.train.engines.construction import forward_ready, weight_keeper
from orchestrator.train.engines.engine import Engine, is_partitioned, layout_of, num_live_engines
from orchestrator.train.engines.zero3_warm import assign_whole
from orchestrator.train.integrity import prove_frozen
from orchestrator.train.learned import LearnedSets
from orchestrator.train.loop import LoopState, SteadySpeed, train_steps
from orchestrator.train.memory import growth_bytes, memory_in_use
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.compiled import compiled_blocks
from orchestrator.train.model.objective import Objective, objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.train.model.scratch import begin_anew
from orchestrator.train.outcome import TrialOutcome
from orchestrator.train.ranks import Ranks
from orchestrator.train.scoring import Scorer
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.work.assignment import EvaluateBase, TrainRung, owner_of
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.results import EngineRecord, StepReport


class TrialRun:
    """An assignment under way. Every rank builds one and calls the same methods in the same order."""

    def __init__(
        self,
        base: LoadedBase,
        assignment: TrainRung | EvaluateBase,
        execution: ExecutionPlan,
        ranks: Ranks,
        load_set: Callable[[str], TokenizedSet],
        trunk: TrunkLibrary,
        saver: Saver,
        base_fingerprint: Mapping[str, str],
        ordinal: int,
        note: Callable[[str], None],
        outcome: TrialOutcome,
        num_fused: int = 1,
    ) -> None:
        self.base = base
        self.assignment = assignment
        self.execution = execution
        self.ranks = ranks
        self.outcome = outcome
        self._load_set = load_set
        self.sets = LearnedSets(assignment, load_set, trunk)
        self._saver = saver
        self._base_fingerprint = base_fingerprint
        self._ordinal = ordinal
        self._num_fused = num_fused
        self._note = note
        self._from_memory = False
        self._peak_bytes = 0
        self._speed = SteadySpeed(0)
        self.rows = RowPlan.of(execution, ranks.rank, classify=base.load.task == "classify")
        self.scorer = Scorer(base, assignment, self.rows, ranks, load_set, is_partitioned(execution), trunk)

    @property
    def training(self) -> TrainRung:
        """The assignment, where it trains."""
        assert isinstance(self.assignment, TrainRung)
        return self.assignment

    def run(self, on_step: Callable[[StepReport], None] | None) -> None:
        """Fill `outcome`; what stands in it after an error is how far the trial came."""
        assignment, trial = self.assignment, self.assignment.trial
        torch.manual_seed(trial.seed)
        with ExitStack() as stack:
            keeper = weight_keeper(self.execution)
            branch = stack.enter_context(
                open_branch(self.base, assignment.selection, lora_alpha=trial.lora_alpha, seed=trial.seed, keeper=keeper)
            )
            if trial.control == "scratch":
                begin_anew(branch, trial.seed)
            objective = objective_of(self.base, branch.head(), assignment.selection.cut)
            if isinstance(assignment, EvaluateBase):
                self._score_untrained(objective, stack)
                return
            start = self.start_point(branch)
            if self.execution.checkpointing:
                blocks = branch.model.get_submodule(self.base.anatomy.blocks_module)
                stack.enter_context(recomputed(list(blocks.children())[assignment.selection.cut :]))
            engine = self.build_engine(objective, branch)
            stack.callback(engine.close)
            if start is not None and not start.exact:
                self.take_weights(branch, start.folder)
                engine.refresh_masters()
            if start is not None and start.exact:
                start.resume(engine, self.ranks)
            self.outcome.state = start.state if start is not None else LoopState()
            self.record_engine(engine)
            self._train(engine, branch, on_step)
            if self.training.evaluate:
                self.outcome.scores = self.scorer.score(objective)
            pulse.enter("saving")
            self.record_peaks()
            self.prove_frozen(branch)
            self.save_rung(engine, branch)

    def take_weights(self, branch: Branch, folder: Path) -> None:
        if not is_partitioned(self.execution):
            load_artifact(branch, folder)
            return
        load_artifact(branch, folder, assign_whole)

    def start_point(self, branch: Branch) -> StartPoint | None:
        """Where the trial goes on from: a whole checkpoint of its own that fits its freshly opened branch."""
        if self.training.start is None:
            return None
        start, folder, seed = Path(self.training.start), Path(self.assignment.folder), self.assignment.trial.seed
        layout = layout_of(self.execution)
        remembered = self._saver.find(start, seed=seed, layout=layout)
        self._from_memory = remembered is not None
        if remembered is not None:
            return remembered
        self._saver.settle(folder)
        wanted = Wanted(seed, layout, owner_of(self.assignment), lambda found: misfit(branch, found))
        return open_checkpoint(start, folder, self.ranks, wanted, note=self._note)

    def build_engine(self, objective: Objective, branch: Branch) -> Engine:
        """The branch holds the base's own weights still."""
        sets, execution, fingerprint = self.sets, self.execution, self._base_fingerprint
        return build_engine(objective, branch, self.training, execution, self.ranks, self.rows, sets, fingerprint)

    def _train(self, engine: Engine, branch: Branch, on_step: Callable[[StepReport], None] | None) -> None:
        assignment = self.training

        def after_step(report: StepReport, state: LoopState) -> None:
            self.after_step(report, state, engine, branch)
            if on_step is not None:
                on_step(report)

        self.begin_steps()
        started = time.perf_counter()
        engine.objective.train()
        with compiled_blocks(self.base, assignment.selection.cut, self.execution) as compiling:
            self.outcome.state = train_steps(
                engine,
                self.sets.steps,
                replace(self.rows, one_shape=self.execution.compiled),
                assignment.trial,
                assignment.settings,
                self.ranks,
                self.outcome.state,
                assignment.stop_step,
                after_step,
                self.sets.states,
            )
        self.outcome.compile_seconds = compiling.seconds
        self.outcome.train_seconds = time.perf_counter() - started
        self.record_engine(engine)

    def begin_steps(self) -> None:
        """Before the first step of this assignment, with `outcome.state` where it begins."""
        state = self.outcome.state
        self._speed = SteadySpeed(state.tokens)
        if self.ranks.first:
            forget_steps_after(state.step, Path(self.assignment.folder) / "steps.jsonl")

    def after_step(self, report: StepReport, state: LoopState, engine: Engine, branch: Branch) -> None:
        """Write the step down, and a checkpoint where one is due."""
        folder, every = Path(self.assignment.folder), self.training.checkpoint_every_steps
        self._speed.add(report)
        self.outcome.steady_tokens_per_s = self._speed.tokens_per_s
        self._peak_bytes = max(self._peak_bytes, report.memory_bytes)
        self.outcome.state = state
        if self.ranks.first:
            append_jsonl(folder / "steps.jsonl", report)
        if every and state.step % every == 0 and state.step < self.training.stop_step:
            self._save(checkpoint_folder(folder, state.step), engine, branch, final=False)

    def _score_untrained(self, objective: Objective, stack: ExitStack) -> None:
        """The untouched base; a classifier that nobody trained is the class prior."""
        if self.base.load.task == "classify":
            self.outcome.scores = self.scorer.score_prior(objective)
        else:
            stack.enter_context(forward_ready(objective, self.execution))
            self.outcome.scores = self.scorer.score(objective)
        self.outcome.engine = self._engine_record("none", "", partitioned_bytes=0, trainable_parameters=0)
        self.record_peaks()
        if self.ranks.first:
            folder = Path(self.assignment.folder)
            folder.mkdir(parents=True, exist_ok=True)
            for name, evaluation in self.outcome.scores.by_set().items():
                evaluation.save(folder / f"{name}.npz")

    def prove_frozen(self, branch: Branch) -> None:
        """Law 2: what did not learn is bit for bit what was loaded; every rank hears of a difference on any."""
        prove_frozen(branch.model, self._base_fingerprint, self.ranks)

    def save_rung(self, engine: Engine, branch: Branch) -> None:
        """What the next rung goes on from, and what promotion takes."""
        self._save(rung_folder(Path(self.assignment.folder), self.assignment.rung), engine, branch, final=True)

    def _save(self, folder: Path, engine: Engine, branch: Branch, *, final: bool) -> None:
        pulse.enter("saving")
        together = self.execution.executor == "deepspeed"
        snapshot = take_snapshot(
            branch,
            engine,
            self.outcome.state,
            self.ranks,
            seed=self.assignment.trial.seed,
            layout=layout_of(self.execution),
            keep_optimizer=self.training.keep_optimizer or not final,
            evaluations=self.outcome.scores.by_set() if final else {},
            gathered=not together,
            owner=owner_of(self.assignment),
        )
        held, gangs = self._saver.held_bytes + snapshot.num_bytes, self.assignment.num_gangs
        growth = growth_bytes(self.ranks.device, self.assignment.largest_memory_bytes, held)
        self._saver.save(folder, snapshot, self.ranks, together=together, rung=final, growth_bytes=growth, num_gangs=gangs)
        if final:
            self.outcome.checkpoint = folder

    def record_engine(self, engine: Engine) -> None:
        self.outcome.engine = self._engine_record(
            self.execution.executor,
            engine.name,
            partitioned_bytes=engine.state_bytes,
            trainable_parameters=self.assignment.selection.num_trainable_parameters,
        )

    def record_peaks(self) -> None:
        """What every rank has used so far, beside what the plan said. Called on every rank."""
        peaks = self.ranks.gather(max(self._peak_bytes, memory_in_use(self.ranks.device)))
        assert self.outcome.engine is not None
        update = {"peak_memory_bytes": max(peaks), "rank_peak_memory_bytes": tuple(peaks)}
        self.outcome.engine = self.outcome.engine.model_copy(update=update)

    def _engine_record(
        self,
        executor: Literal["torch", "deepspeed", "none"],
        engine_class: str,
        *,
        partitioned_bytes: int,
        trainable_parameters: int,
    ) -> EngineRecord:
        return EngineRecord(
            executor=executor,
            engine_class=engine_class,
            zero_stage=self.execution.zero_stage,
            ranks=self.ranks.count,
            partitioned_bytes=partitioned_bytes,
            trainable_parameters=trainable_parameters,
            peak_memory_bytes=0,
            live_engines=num_live_engines(),
            base_loads=self.base.num_loads,
            ordinal=self._ordinal,
            device=self.execution.device,
            predicted_memory_bytes=self.assignment.predicted_memory_bytes if self._num_fused == 1 else None,
            micro_batch_rows=self.execution.micro_batch_rows,
            checkpointing=self.execution.checkpointing,
            fused_trials=self._num_fused,
            from_memory=self._from_memory,
            compiled=executor != "none" and self.execution.compiled,
            compile_seconds=self.outcome.compile_seconds,
            trunk_cut=None if self.sets.states is None else self.assignment.selection.cut,
        )
