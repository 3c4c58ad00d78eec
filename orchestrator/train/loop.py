"""The training loop, the same for single trials, for several in one batch, and for every engine."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from orchestrator.errors import NonFiniteLossError, OutOfMemoryError
from orchestrator.train import heartbeat
from orchestrator.train.batches import StepInput, repeated
from orchestrator.train.engines.engine import Engine
from orchestrator.train.memory import is_out_of_memory, memory_in_use
from orchestrator.train.model.objective import Objective
from orchestrator.train.ranks import Ranks
from orchestrator.work.execution import TrainSettings
from orchestrator.work.failure import Failure
from orchestrator.work.results import StepReport
from orchestrator.work.trial import TrialSpec


@dataclass(frozen=True)
class LoopState:
    """The training progress of a trial: steps, training tokens, the loss of the last step."""

    step: int = 0
    tokens: int = 0
    loss: float | None = None


@dataclass
class LoopTrial:
    """One trial in the loop, with a learning rate, an optimizer and a failure of its own."""

    engine: Engine
    trial: TrialSpec
    settings: TrainSettings
    on_step: Callable[[StepReport, LoopState], None]
    """Called on every rank after each step that the trial takes."""
    state: LoopState = field(default_factory=LoopState)
    failure: Failure | None = None
    """Why it takes no more steps. Not the error itself, whose traceback would keep tensors in memory."""

    def update(self, tokens: int, loss: float) -> tuple[float, float] | None:
        """Take the step whose gradients the engine holds.

        Args:
            tokens: Training tokens of the step.
            loss: Its loss; the update is not applied where that is not finite.

        Returns:
            The learning rate, and the gradient norm before clipping; None where the trial fails, on every rank.
        """
        rate = step_learning_rate(
            self.state.tokens,
            tokens,
            total_tokens=self.trial.total_tokens,
            peak=self.trial.learning_rate,
            settings=self.settings,
        )
        try:
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"the training loss became {loss}", expected="a finite number", remedy="lower the learning rate"
                )
            return rate, self.engine.step(rate)
        except NonFiniteLossError as error:
            self.failure = Failure.of(error)
            return None


class Rounds(Protocol):
    """The computation of a step: forward and backward passes over this rank's micro-batches."""

    communicates: bool
    """True if the rounds contain collectives, so that a rank that fails in one leaves the others waiting."""

    def accumulate(self, step: StepInput, supervised: int) -> torch.Tensor:
        """Compute the gradients of the losses over `supervised` tokens and leave them with the engines.

        Returns:
            float64[T]: for each trial, the sum of this rank's token losses.
        """
        ...

    def size(self, step: StepInput) -> str:
        """Return how much is computed at once, in words: `a micro-batch of 4 rows`."""
        ...


class EngineRounds:
    """The rounds of a trial that has the model to itself: its engine computes them."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self.communicates = engine.communicates_in_backward

    def accumulate(self, step: StepInput, supervised: int) -> torch.Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64)
        for batch in step.micro_batches:
            loss = self._engine.loss({name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()})
            # In float64, so that the rounding of many rounds does not show in the reported loss.
            loss_sum += loss.detach().double().cpu()
            self._engine.backward(loss, 1.0 / supervised)
        return loss_sum.reshape(1)

    def size(self, step: StepInput) -> str:
        return f"a micro-batch of {_num_rows(step)} rows"


class StackedRounds:
    """The rounds of several trials in one batch: the same rows once for each, in one forward and one backward pass.

    The engines are not called. They read the gradients of their own parameters, which no other trial's loss reaches.
    """

    communicates = False

    def __init__(self, objective: Objective, num_trials: int) -> None:
        self._objective, self._num_trials = objective, num_trials

    def accumulate(self, step: StepInput, supervised: int) -> torch.Tensor:
        device = next(self._objective.model.parameters()).device
        sums = torch.zeros(self._num_trials, dtype=torch.float64)
        for batch in step.micro_batches:
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            losses = self._objective(**repeated(tensors, self._num_trials), num_trials=self._num_trials)
            sums += losses.detach().double().cpu()
            (losses.sum() * (1.0 / supervised)).backward()
        return sums

    def size(self, step: StepInput) -> str:
        return f"a batch of {self._num_trials} trials x {_num_rows(step)} rows"


def _num_rows(step: StepInput) -> int:
    return step.micro_batches[0]["input_ids"].shape[0]


def train_steps(trials: Sequence[LoopTrial], rounds: Rounds, steps: Iterator[StepInput], ranks: Ranks) -> None:
    """Train the trials on the same steps, until these end or every trial has failed.

    A step's loss is the sum over its supervised tokens, on all ranks and in all rounds, divided by their number, so that
    ranks with unequal shares are weighted correctly. In classification a document counts as one token.

    Args:
        trials: The trials, all at the step before the first of `steps`, in the order of
            `rounds`. Their states are advanced. One that
            fails takes no more steps; its rows stay in the batch and change no other trial's numbers.
        rounds: The computation of a step.
        steps: This rank's share of each step.
        ranks: This process among those that train together.

    Raises:
        OutOfMemoryError: on every rank, where no collective was under way (see `_losses`).
    """
    started = time.perf_counter()
    for step in steps:
        # The denominator of the loss comes before the forward passes, since every round's gradient is scaled by it.
        tokens, supervised = (int(count) for count in ranks.sum([step.num_tokens, step.num_supervised]))
        first = trials[0]
        if first.trial.adapter.dropout:  # such a trial shares no batch
            torch.manual_seed(_dropout_seed(first.trial.seed, ranks.rank, first.state.step))
        losses = _losses(rounds, step, supervised, ranks, len(trials))
        # Every trial is updated before one is reported: a report may write a checkpoint, which is not training time.
        taken = [
            (trial, loss, *update)
            for trial, loss in zip(trials, losses, strict=True)
            if not trial.failure and (update := trial.update(tokens, loss)) is not None
        ]
        tokens_per_s = tokens * len(trials) / (time.perf_counter() - started)
        for trial, loss, rate, norm in taken:
            trial.state = replace(trial.state, step=trial.state.step + 1, tokens=trial.state.tokens + tokens, loss=loss)
            report = StepReport(
                step=trial.state.step,
                epoch=step.epoch,
                tokens=trial.state.tokens,
                supervised_tokens=supervised,
                loss=loss,
                loss_hex=loss.hex(),
                learning_rate=rate,
                grad_norm=norm,
                tokens_per_s=tokens_per_s,
                memory_bytes=memory_in_use(ranks.device),
            )
            trial.on_step(report, trial.state)
            heartbeat.beat(trial.state.step)
        if all(trial.failure for trial in trials):
            return
        started = time.perf_counter()


def _dropout_seed(seed: int, rank: int, step: int) -> int:
    """Return the seed of the masks that a rank draws in one step: a resumed trial draws the same ones."""
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{rank}:{step}".encode()).digest()[:8], "little") >> 1


def _losses(rounds: Rounds, step: StepInput, supervised: int, ranks: Ranks, num_trials: int) -> list[float]:
    """Compute a step's gradients and return each trial's loss, the same bits on every rank.

    If memory runs out on one rank, the others are informed here. That works where the rounds contain no collective (torch,
    ZeRO 0 and 1). Under ZeRO 2 and 3 the error leaves the other ranks waiting: the gang ends, and the next one restarts
    the trial with a smaller execution.

    Raises:
        OutOfMemoryError: on every rank; no trial has taken the step.
    """
    sums = [0.0] * num_trials
    out_of_memory: BaseException | None = None
    try:
        sums = rounds.accumulate(step, supervised).tolist()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or (ranks.count > 1 and rounds.communicates):
            raise
        out_of_memory = error
    # One collective for losses and for the news of a failure: no rank can leave the step without the others.
    *totals, num_out = ranks.sum([*sums, float(out_of_memory is not None)])
    if num_out:
        raise OutOfMemoryError(
            f"out of memory on {num_out:.0f} of {ranks.count} ranks in {rounds.size(step)}",
            remedy="fewer rows in a micro-batch, a higher ZeRO stage, or shorter documents",
        ) from out_of_memory
    return [total / supervised for total in totals]


def learning_rate_at(tokens: float, *, total_tokens: int, peak: float, settings: TrainSettings) -> float:
    """Return the learning rate after `tokens` training tokens.

    It rises linearly from 0 to `peak` over the first `warmup` share of `total_tokens`, then falls to 0 as a half
    cosine (Loshchilov and Hutter 2017) or a line, or stays. Beyond `total_tokens` it keeps its last value.
    """
    warm = settings.warmup * total_tokens
    if tokens < warm:
        return peak * tokens / warm
    if settings.schedule == "constant" or total_tokens <= warm:
        return peak
    progress = min(1.0, (tokens - warm) / (total_tokens - warm))
    if settings.schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def step_learning_rate(tokens_before: int, step_tokens: int, *, total_tokens: int, peak: float, settings: TrainSettings) -> float:
    """Return the learning rate of one step: that of its middle token, so that neither the first nor the last step has rate 0."""
    return learning_rate_at(tokens_before + step_tokens / 2, total_tokens=total_tokens, peak=peak, settings=settings)


WARM_UP_STEPS = 2
"""Steps of a new engine that are not timed: kernels are chosen, caches filled and buffers allocated in them."""


class SteadySpeed:
    """Training tokens per second of a rung's steps, without the first ones.

    Args:
        tokens: Training tokens that the trial had seen before.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._num_steps = 0
        self._steady_tokens = 0
        self._steady_seconds = 0.0

    def add(self, report: StepReport) -> None:
        tokens, self._tokens = report.tokens - self._tokens, report.tokens
        self._num_steps += 1
        if self._num_steps > WARM_UP_STEPS and report.tokens_per_s > 0:
            self._steady_tokens += tokens
            self._steady_seconds += tokens / report.tokens_per_s

    @property
    def tokens_per_s(self) -> float | None:
        """Training tokens per second over all ranks; None where there were only warm-up steps."""
        return self._steady_tokens / self._steady_seconds if self._steady_seconds else None
