"""A training session: one trial, or several in one batch, trained to their next rung; and the base's evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.errors import NonFiniteLossError, TrainingError
from orchestrator.train import heartbeat
from orchestrator.train.adapters.branch import Branch, open_branch, open_group
from orchestrator.train.adapters.layers import AdapterSpec
from orchestrator.train.batches import step_inputs
from orchestrator.train.context import HostContext
from orchestrator.train.engines.construction import forward_ready, weight_keeper
from orchestrator.train.integrity import prove_frozen
from orchestrator.train.loop import EngineRounds, StackedRounds, train_steps
from orchestrator.train.member import Member, OnStep, SessionSetup, open_member
from orchestrator.train.memory import memory_in_use
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.compiled import compiled_blocks
from orchestrator.train.model.objective import Objective, objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.train.model.scratch import begin_anew
from orchestrator.train.outcome import TrialOutcome, forward_record
from orchestrator.train.scoring import Scorer
from orchestrator.work.assignment import EvaluateBase, TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure


class TrainingSession:
    """Trials with one cut, one order of documents and one range of steps: most often a single one.

    Each has its own learning rate, clipping, optimizer, checkpoints and failure. Its numbers are the same as without the others.
    Every rank holds all of them, makes the same calls in the same order and makes the same decisions about each.

    Args:
        context: What this rank holds.
        outcomes: The trials' work; the outcome of each is filled in. Several share a batch, in the order of their rows.
        execution: How they are trained; smaller than planned where memory ran out.
        ordinal: How many pieces of work the gang had run before.
    """

    def __init__(
        self, context: HostContext, outcomes: Sequence[TrialOutcome[TrainRung]], execution: ExecutionPlan, ordinal: int
    ) -> None:
        self.context = context
        self.outcomes = tuple(outcomes)
        self.execution = execution
        self.setup = SessionSetup(context, execution, ordinal, len(outcomes))

    def run(self, on_step: OnStep = None) -> None:
        """Open the branches, train, evaluate, prove that nothing frozen changed, save and close.

        A trial's own failure (a loss that is not finite) is in its outcome, with the progress that it made.

        Raises:
            OutOfMemoryError: the session does not fit, and every rank knows; no rung was written.
            Exception: whatever else fails all of its trials.
        """
        first, context = self.outcomes[0].work, self.context
        cut = first.selection.cut
        # Dropout draws from the process's generator: a trial's numbers must not depend on the trial before it.
        torch.manual_seed(first.trial.seed)
        with ExitStack() as stack:
            branches = open_branches(context.base, [outcome.work for outcome in self.outcomes], self.execution, stack)
            if first.trial.control == "scratch":
                begin_anew(branches[0], first.trial.seed)
            objective = prepared_objective(context.base, branches[0], cut, self.execution, stack)
            members: list[Member] = []
            for outcome, branch in zip(self.outcomes, branches, strict=True):
                members.append(open_member(self.setup, outcome, branch, objective))
                # Engines close before their branches do: they still refer to the branch's parameters.
                stack.callback(members[-1].engine.close)
            self._train(objective, members, on_step)
            self._score(objective)
            heartbeat.enter("saving")
            finished = [member for member in members if not member.outcome.failure]
            for member in finished:
                member.record_peaks()
            # Law 2, and before anything is saved: a rung trained on a changed base must not exist.
            prove_frozen(branches[0].model, context.fingerprint, context.ranks)
            for member in finished:
                member.save_rung()

    def _train(self, objective: Objective, members: Sequence[Member], on_step: OnStep) -> None:
        first, state = members[0], self.outcomes[0].state
        if any((outcome.state.step, outcome.state.tokens) != (state.step, state.tokens) for outcome in self.outcomes):
            raise TrainingError("trials in one batch must be at the same step", remedy="run them separately")
        trials = [member.begin(on_step) for member in members]
        execution, ranks = self.execution, self.context.ranks
        rows = replace(self.context.rows(execution), one_shape=execution.compiled)
        rounds = EngineRounds(first.engine, ranks.device) if len(members) == 1 else StackedRounds(objective, len(members))
        started = time.perf_counter()
        objective.train()
        with compiled_blocks(self.context.base, first.outcome.work.selection.cut, execution) as compiling:
            steps = step_inputs(first.sets.steps, rows, state.step, first.outcome.work.stop_step, first.sets.states)
            train_steps(trials, rounds, steps, ranks)
        seconds = time.perf_counter() - started
        for member, trial in zip(members, trials, strict=True):
            member.outcome.failure = trial.failure
            member.outcome.compile_seconds = compiling.seconds / len(members)
            member.outcome.train_seconds = seconds / len(members)
            member.record_engine()

    def _score(self, objective: Objective) -> None:
        """Evaluate all trials at once, also those that failed: their rows are in the batch, and their scores are dropped."""
        work = self.outcomes[0].work
        if not work.evaluate or all(outcome.failure for outcome in self.outcomes):
            return
        scorer = Scorer(self.context, work, self.execution)
        for outcome, scores in zip(self.outcomes, scorer.score_trials(objective, len(self.outcomes)), strict=True):
            if isinstance(scores, NonFiniteLossError):
                outcome.failure = outcome.failure or Failure.of(scores)
            elif not outcome.failure:
                outcome.scores = scores


def open_branches(base: LoadedBase, works: Sequence[TrainRung], execution: ExecutionPlan, stack: ExitStack) -> Sequence[Branch]:
    """Open each trial's branch until the stack closes. A single trial may train anything, several only adapters in blocks."""
    if len(works) > 1:
        return open_stacked(base, works, stack)
    trial, keeper = works[0].trial, weight_keeper(execution)
    opened = open_branch(base, works[0].selection, lora_alpha=trial.lora_alpha, seed=trial.seed, keeper=keeper)
    return [stack.enter_context(opened)]


def open_stacked(base: LoadedBase, works: Sequence[TrainRung], stack: ExitStack) -> Sequence[Branch]:
    """Open the branches of trials that share a batch, until the stack closes."""
    specs = [AdapterSpec(work.selection, work.trial.lora_alpha, work.trial.seed) for work in works]
    return stack.enter_context(open_group(base, specs)).branches


def prepared_objective(base: LoadedBase, branch: Branch, cut: int, execution: ExecutionPlan, stack: ExitStack) -> Objective:
    """Return the objective of an open branch, with the blocks from the cut up checkpointed where the execution says so."""
    objective = objective_of(base, branch.head(), cut)
    if execution.checkpointing:
        blocks = base.model.get_submodule(base.anatomy.blocks_module)
        stack.enter_context(recomputed(list(blocks.children())[cut:]))
    return objective


def evaluate_base(context: HostContext, outcome: TrialOutcome[EvaluateBase], execution: ExecutionPlan, ordinal: int) -> None:
    """Score the base model; for a classifier, whose head is not trained yet, the class prior.

    Args:
        context: What this rank holds.
        outcome: The work; what becomes of it is filled in.
        execution: How the model is run.
        ordinal: How many pieces of work the gang had run before.
    """
    work, trial = outcome.work, outcome.work.trial
    torch.manual_seed(trial.seed)
    with ExitStack() as stack:
        keeper = weight_keeper(execution)
        opened = open_branch(context.base, work.selection, lora_alpha=trial.lora_alpha, seed=trial.seed, keeper=keeper)
        branch = stack.enter_context(opened)
        objective = objective_of(context.base, branch.head(), work.selection.cut)
        scorer = Scorer(context, work, execution)
        if context.base.load.traits.head.baseline == "class prior":
            outcome.scores = scorer.score_prior(objective)
        else:
            stack.enter_context(forward_ready(objective, execution))
            outcome.scores = scorer.score(objective)
        outcome.engine = forward_record(context, work, execution, ordinal)
        outcome.record_peaks(context, memory_in_use(context.ranks.device))
        if context.ranks.first:
            folder = Path(work.folder)
            folder.mkdir(parents=True, exist_ok=True)
            for name, evaluation in outcome.scores.by_set().items():
                evaluation.save(folder / f"{name}.npz")
