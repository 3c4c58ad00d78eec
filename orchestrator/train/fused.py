"""Several LoRA trials in one batch: the same documents for each, the base's products once for all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from orchestrator.errors import NonFiniteLossError, OutOfMemoryError, TrainingError
from orchestrator.train import pulse
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.adapters.group import open_group
from orchestrator.train.adapters.lora import AdapterSpec
from orchestrator.train.batches import StepInput, repeated, step_inputs
from orchestrator.train.engines.engine import Engine
from orchestrator.train.loop import LoopState, step_learning_rate
from orchestrator.train.memory import is_out_of_memory, memory_in_use
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import Objective, objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.train.ranks import Ranks
from orchestrator.train.trial import TrialRun
from orchestrator.work.assignment import TrainRung
from orchestrator.work.results import StepReport


@dataclass
class Member:
    """A trial of the group, in the order of its rows."""

    run: TrialRun
    branch: Branch
    engine: Engine
    failure: TrainingError | None = None
    """Why it learns no more; its rows stay until the group ends, and touch nobody."""


class FusedRun:
    """A group under way: T trials with one cut, one order of documents, and one stretch of steps.

    Each has its own learning rate, clipping, optimizer, checkpoints and failure. Its numbers are those that it has alone.
    Every rank holds all of them and comes to the same decisions about each.
    """

    def __init__(self, base: LoadedBase, runs: Sequence[TrialRun]) -> None:
        self._base = base
        self._runs = runs

    def run(self, on_step: Callable[[StepReport], None] | None) -> list[TrainingError | None]:
        """Fill every run's outcome; by trial, why it failed.

        Raises:
            OutOfMemoryError: the group does not fit, and every rank knows; no rung was written.
        """
        first = self._runs[0]
        specs = [
            AdapterSpec(run.assignment.selection, run.assignment.trial.lora_alpha, run.assignment.trial.seed)
            for run in self._runs
        ]
        torch.manual_seed(first.assignment.trial.seed)
        with ExitStack() as stack:
            group = stack.enter_context(open_group(self._base, specs))
            cut = first.assignment.selection.cut
            objective = objective_of(self._base, group.branches[0].head(), cut)
            if first.execution.checkpointing:
                blocks = self._base.model.get_submodule(self._base.anatomy.blocks_module)
                stack.enter_context(recomputed(list(blocks.children())[cut:]))
            members = [
                self._member(run, branch, objective, stack) for run, branch in zip(self._runs, group.branches, strict=True)
            ]
            self._train(objective, members, on_step)
            self._score(objective, members)
            pulse.enter("saving")
            first.prove_frozen(group.branches[0])
            for member in members:
                if member.failure is None:
                    member.run.record_peaks()
                    member.run.save_rung(member.engine, member.branch)
        return [member.failure for member in members]

    def _member(self, run: TrialRun, branch: Branch, objective: Objective, stack: ExitStack) -> Member:
        start = run.start_point(branch)
        engine = run.build_engine(objective, branch)
        stack.callback(engine.close)
        if start is not None and not start.exact:
            run.take_weights(branch, start.folder)
            engine.refresh_masters()
        if start is not None and start.exact:
            start.resume(engine, run.ranks)
        run.outcome.state = start.state if start is not None else LoopState()
        run.record_engine(engine)
        return Member(run, branch, engine)

    def _train(self, objective: Objective, members: Sequence[Member], on_step: Callable[[StepReport], None] | None) -> None:
        first = members[0].run
        state = first.outcome.state
        if any((m.run.outcome.state.step, m.run.outcome.state.tokens) != (state.step, state.tokens) for m in members):
            raise TrainingError("trials in one batch must be at the same step", remedy="run them separately")
        started = time.perf_counter()
        for member in members:
            member.run.begin_steps()
        objective.train()
        steps = step_inputs(first.sets.steps, first.rows, state.step, first.training.stop_step, first.sets.states)
        for step in steps:
            self._step(objective, members, step, on_step)
            if all(member.failure for member in members):
                break
        for member in members:
            member.run.outcome.train_seconds = (time.perf_counter() - started) / len(members)
            member.run.record_engine(member.engine)

    def _step(
        self, objective: Objective, members: Sequence[Member], step: StepInput, on_step: Callable[[StepReport], None] | None
    ) -> None:
        started = time.perf_counter()
        ranks = members[0].run.ranks
        tokens, supervised = (int(count) for count in ranks.sum([step.num_tokens, step.num_supervised]))
        losses = _losses(objective, step, len(members), supervised, ranks)
        taken = [
            (member, loss, *update)
            for member, loss in zip(members, losses, strict=True)
            if member.failure is None and (update := _update(member, tokens, loss)) is not None
        ]
        tokens_per_s = tokens * len(members) / (time.perf_counter() - started)
        for member, loss, rate, norm in taken:
            run, state = member.run, member.run.outcome.state
            state = replace(state, step=state.step + 1, tokens=state.tokens + tokens, loss=loss)
            report = StepReport(
                step=state.step,
                epoch=step.epoch,
                tokens=state.tokens,
                supervised_tokens=supervised,
                loss=loss,
                loss_hex=loss.hex(),
                learning_rate=rate,
                grad_norm=norm,
                tokens_per_s=tokens_per_s,
                memory_bytes=memory_in_use(run.ranks.device),
            )
            run.after_step(report, state, member.engine, member.branch)
            if on_step is not None:
                on_step(report)
            pulse.beat(state.step)

    def _score(self, objective: Objective, members: Sequence[Member]) -> None:
        """All trials of the group at once, also those that failed; their scores are dropped."""
        if not members[0].run.training.evaluate or all(member.failure for member in members):
            return
        for member, scores in zip(members, members[0].run.scorer.score_trials(objective, len(members)), strict=True):
            if isinstance(scores, NonFiniteLossError):
                member.failure = member.failure or scores
            else:
                member.run.outcome.scores = scores


def _update(member: Member, tokens: int, loss: float) -> tuple[float, float] | None:
    """(learning rate, gradient norm) of the step of so many tokens that the member takes; None where it fails by it."""
    trial, settings = member.run.assignment.trial, member.run.assignment.settings
    seen = member.run.outcome.state.tokens
    rate = step_learning_rate(seen, tokens, total_tokens=trial.total_tokens, peak=trial.learning_rate, settings=settings)
    try:
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss became {loss}", expected="a finite number", remedy="lower the learning rate"
            )
        return rate, member.engine.step(rate)
    except NonFiniteLossError as error:
        member.failure = error
        return None


def spec_of(assignment: TrainRung) -> AdapterSpec:
    return AdapterSpec(assignment.selection, assignment.trial.lora_alpha, assignment.trial.seed)


def _losses(objective: Objective, step: StepInput, num_trials: int, supervised: int, ranks: Ranks) -> list[float]:
    """Each trial's loss over the step's supervised tokens, the same bits on every rank; this rank's gradients are in the
    trials' engines.

    Raises:
        OutOfMemoryError: on every rank alike, whichever it was; no trial has taken the step.
    """
    sums = torch.zeros(num_trials, dtype=torch.float64)
    out_of_memory: BaseException | None = None
    try:
        sums = accumulate(objective, step, num_trials, supervised)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = error
    *totals, num_out = ranks.sum([*sums.tolist(), float(out_of_memory is not None)])
    if num_out:
        num_rows = step.micro_batches[0]["input_ids"].shape[0]
        raise OutOfMemoryError(
            f"out of memory on {num_out:.0f} of {ranks.count} ranks in a batch of {num_trials} trials x {num_rows} rows"
        ) from out_of_memory
    return [total / supervised for total in totals]


def accumulate(objective: Objective, step: StepInput, num_trials: int, supervised: int) -> torch.Tensor:
    """float64[T]: this rank's loss sums; the gradients of each trial's sum over `supervised` tokens are in its engine."""
    device = next(objective.model.parameters()).device
    sums = torch.zeros(num_trials, dtype=torch.float64)
    for batch in step.micro_batches:
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        losses = objective(**repeated(tensors, num_trials), num_trials=num_trials)
        sums += losses.detach().double().cpu()
        (losses.sum() * (1.0 / supervised)).backward()
    return sums
