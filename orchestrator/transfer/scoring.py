"""The objective of the search: one number per trial, from the metric and the penalty for forgetting."""

from __future__ import annotations

import math

SMALLEST_GAIN = 0.01
"""Smallest gain that matters: a hundredth of a nat per token, one point of accuracy. An interval that excludes it gives `no
gain`; one that includes both it and zero gives `inconclusive`."""

FORGETTING_WEIGHT = 10.0
"""Penalty per nat per token of forgetting beyond the bound, in nats of the target or in whole units of accuracy. A tenth of a
nat above the bound outweighs any gain between reasonable rates, and the slope still guides the sampler back."""
WORST_SCORE = 1e9
"""Score of a trial that failed or has no finite score: finite, since schedulers average scores, and worse than any other."""


def forgetting(retain_loss: float, base_retain_loss: float) -> float:
    """Return the rise of the retention loss over the base model's, nats per token; negative if the model improved."""
    return retain_loss - base_retain_loss


def score(metric_value: float, higher_is_better: bool, forgetting: float | None, bound: float) -> float:
    """Return target plus penalty; lower is better, and it is always finite.

    The target is a loss as it stands, and 1 - value for a metric that is better when higher (accuracy, F1, exact
    match: 0 is perfect). Beyond `bound` each nat per token of forgetting adds FORGETTING_WEIGHT.

    Args:
        forgetting: Nats per token; None where there is no retention set, which costs nothing.
        bound: `search.max_forgetting`, nats per token.
    """
    # So that schedulers always minimise, and 0 is perfect in both cases.
    target = 1.0 - metric_value if higher_is_better else metric_value
    if not math.isfinite(target) or (forgetting is not None and not math.isfinite(forgetting)):
        return WORST_SCORE
    penalty = FORGETTING_WEIGHT * max(0.0, forgetting - bound) if forgetting is not None else 0.0
    return min(target + penalty, WORST_SCORE)
