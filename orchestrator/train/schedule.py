"""The learning rate as a function of the tokens seen."""

from __future__ import annotations

import math

from orchestrator.plan.values import TrainSettings


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
