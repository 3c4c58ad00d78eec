"""One number per trial: what the search minimises, and what it holds against forgetting."""

from __future__ import annotations

import math

SMALLEST_GAIN = 0.01
"""A gain that matters: a hundredth of a nat per token, one point of an accuracy. Where an interval holds no gain too, it
parts `no gain` (a gain that matters is excluded) from `inconclusive` (it is not)."""

FORGETTING_WEIGHT = 10.0
"""What a nat per token of forgetting beyond the bound costs, in nats of the target or in whole units of an
accuracy: a tenth of a nat too much outweighs any gain that a search of sane rates brings, and the slope still
tells the sampler which way is back."""
WORST_SCORE = 1e9
"""Of what failed, or has a score that is not a number: finite, since schedulers average, and worse than any other."""


def forgetting(retain_loss: float, base_retain_loss: float) -> float:
    """Rise of the retention loss over the untouched base's, nats per token; negative where the model got better."""
    return retain_loss - base_retain_loss


def score(metric_value: float, higher_is_better: bool, forgetting: float | None, bound: float) -> float:
    """Target plus penalty; lower is better, and always finite.

    The target is a loss as it stands, and 1 - value for a metric that is better when higher (accuracy, F1, exact
    match: 0 is perfect). Beyond `bound` each nat per token of forgetting adds FORGETTING_WEIGHT.

    Args:
        forgetting: Nats per token; None where there is no retention set, which costs nothing.
        bound: `search.max_forgetting`, nats per token.
    """
    target = 1.0 - metric_value if higher_is_better else metric_value
    if not math.isfinite(target) or (forgetting is not None and not math.isfinite(forgetting)):
        return WORST_SCORE
    penalty = FORGETTING_WEIGHT * max(0.0, forgetting - bound) if forgetting is not None else 0.0
    return min(target + penalty, WORST_SCORE)
