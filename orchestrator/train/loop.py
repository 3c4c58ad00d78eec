"""The one training loop: every trial, every engine, every stage."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from orchestrator.errors import NonFiniteLossError, OutOfMemoryError
from orchestrator.train import pulse
from orchestrator.train.batches import RowPlan, StepInput, StepPlan, step_inputs
from orchestrator.train.engines.engine import Engine
from orchestrator.train.memory import is_out_of_memory, memory_in_use
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.work.execution import TrainSettings
from orchestrator.work.results import StepReport
from orchestrator.work.trial import TrialSpec


@dataclass(frozen=True)
class LoopState:
    """Where a trial stands: steps done, training tokens seen, the loss of the last step."""

    step: int = 0
    tokens: int = 0
    loss: float | None = None


def train_steps(
    engine: Engine,
    steps: StepPlan,
    rows: RowPlan,
    trial: TrialSpec,
    settings: TrainSettings,
    ranks: Ranks,
    state: LoopState,
    stop_step: int,
    on_step: Callable[[StepReport, LoopState], None],
    trunk: TrunkStates | None = None,
) -> LoopState:
    """Train from `state` up to and including `stop_step`; `on_step` is called on every rank after each step.

    With a `trunk`, the objective begins from its hidden states.

    A step's loss is the sum over its supervised tokens, on all ranks and in all rounds, divided by their number, so
    that ranks with unequal shares weigh right. To classify, a document counts as one token.

    Raises:
        NonFiniteLossError: on every rank alike, before the update is applied.
        OutOfMemoryError: on every rank alike, where no collective was under way (see `_accumulate`).
    """
    started = time.perf_counter()
    for step in step_inputs(steps, rows, state.step, stop_step, trunk):
        tokens, supervised = ranks.sum([step.num_tokens, step.num_supervised])
        if trial.adapter.dropout:
            torch.manual_seed(step_seed(trial.seed, ranks.rank, state.step))
        loss = _accumulate(engine, step, int(supervised), ranks)
        rate = step_learning_rate(
            state.tokens, int(tokens), total_tokens=trial.total_tokens, peak=trial.learning_rate, settings=settings
        )
        norm = engine.step(rate)
        state = replace(state, step=state.step + 1, tokens=state.tokens + int(tokens), loss=loss)
        report = StepReport(
            step=state.step,
            epoch=step.epoch,
            tokens=state.tokens,
            supervised_tokens=int(supervised),
            loss=loss,
            loss_hex=loss.hex(),
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_s=tokens / (time.perf_counter() - started),
            memory_bytes=memory_in_use(ranks.device),
        )
        on_step(report, state)
        pulse.beat(state.step)
        started = time.perf_counter()
    return state


def step_seed(seed: int, rank: int, step: int) -> int:
    """Return the seed of what a rank drops out in one step: a resumed trial draws the same masks."""
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{rank}:{step}".encode()).digest()[:8], "little") >> 1


def _accumulate(engine: Engine, step: StepInput, supervised: int, ranks: Ranks) -> float:
    """Forward and backward over this rank's rounds; the step's loss, the same bits on every rank.

    Memory that runs out on one rank is made known to the others here. That works where the rounds hold no
    collective (torch, ZeRO 0 and 1); under ZeRO 2 and 3 the error leaves the others waiting: the gang ends, and the
    next one starts the trial again one step down.
    """
    loss_sum = torch.zeros((), dtype=torch.float64)
    out_of_memory: BaseException | None = None
    try:
        for batch in step.micro_batches:
            loss = engine.loss({name: tensor.to(ranks.device, non_blocking=True) for name, tensor in batch.items()})
            loss_sum += loss.detach().double().cpu()
            engine.backward(loss, 1.0 / supervised)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or (ranks.count > 1 and engine.communicates_in_backward):
            raise
        out_of_memory = error
    total, num_out = ranks.sum([loss_sum.item(), float(out_of_memory is not None)])
    if num_out:
        num_rows = step.micro_batches[0]["input_ids"].shape[0]
        raise OutOfMemoryError(
            f"out of memory on {num_out:.0f} of {ranks.count} ranks in a micro-batch of {num_rows} rows",
            remedy="fewer rows in a micro-batch, a higher ZeRO stage, or shorter documents",
        ) from out_of_memory
    loss = total / supervised
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the training loss became {loss}", expected="a finite number", remedy="lower the learning rate")
    return loss


def learning_rate_at(tokens: float, *, total_tokens: int, peak: float, settings: TrainSettings) -> float:
    """The learning rate where `tokens` training tokens have been seen.

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
    """The learning rate of one step: that of its middle token, so that neither the first nor the last step is lost."""
    return learning_rate_at(tokens_before + step_tokens / 2, total_tokens=total_tokens, peak=peak, settings=settings)


WARM_UP_STEPS = 2
"""Kernels are chosen, caches filled and buffers allocated in the first steps of an engine."""


class SteadySpeed:
    """Training tokens a second of an assignment's steps, without its first ones.

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
        """Over all ranks; None where there were no more steps than those to warm up."""
        return self._steady_tokens / self._steady_seconds if self._steady_seconds else None
