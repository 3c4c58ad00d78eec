"""Spearman's rank correlation of two figures, with a 95% interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from orchestrator.values import Value

LEVEL = 0.95
MIN_PAIRS = 4
"""Fewest pairs for an interval: its standard error divides by the number of pairs minus three."""


class Correlation(Value):
    """Spearman's rank correlation; -1 to 1."""

    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    num_pairs: int


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Return Spearman's correlation of first[n] and second[n]; equal values share the mean of their ranks.

    The interval is Fisher's, on the scale of the inverse hyperbolic tangent, with the standard error
    sqrt((1 + r^2 / 2) / (n - 3)) of Bonett & Wright 2000 ("Sample size requirements for estimating Pearson, Kendall and
    Spearman correlations"). A perfect agreement, of which that scale knows nothing, is taken half way to the next lower
    value that n ranks can have, 1 - 12 / (n (n^2 - 1)): four pairs that agree by chance must not look like proof.

    Returns:
        None if it is undefined: fewer than 4 pairs, or one of the two is constant.

    Raises:
        ValueError: unequal lengths, or a figure that is not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"unequal lengths: {len(first)} and {len(second)}")
    if not all(math.isfinite(value) for value in (*first, *second)):
        raise ValueError("expected finite numbers")
    num_pairs = len(first)
    if num_pairs < MIN_PAIRS or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    value = float(np.clip(np.corrcoef(_ranks(first), _ranks(second))[0, 1], -1.0, 1.0))
    # Half way to the next lower value: arctanh(1) is infinite, see above.
    largest = 1 - 6 / (num_pairs * (num_pairs**2 - 1))
    bounded = min(max(value, -largest), largest)
    width = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt((1 + bounded**2 / 2) / (num_pairs - 3))
    low, high = (math.tanh(math.atanh(bounded) + sign * width) for sign in (-1, 1))
    return Correlation(value=value, low=min(low, value), high=max(high, value), num_pairs=num_pairs)


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Return ranks from 1; equal values share the mean of theirs."""
    given = np.asarray(values, float)
    return np.asarray([(given < value).sum() + ((given == value).sum() + 1) / 2 for value in given], float)
