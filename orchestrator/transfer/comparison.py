"""Paired comparison of two models on the same examples: the mean difference and its 95% interval.

Shapes: n examples, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from orchestrator.transfer.records import ComparisonRecord, Control
from orchestrator.transfer.seeds import OverSeeds
from orchestrator.values import Value

BOOTSTRAP_FROM = 200
"""Number of examples from which the bootstrap is used; with fewer, its interval is too narrow."""
NUM_RESAMPLES = 10_000
EXACT_UP_TO = 14
"""Largest number of examples for which all 2^n sign patterns are enumerated."""
NUM_FLIPS = 20_000
LEVEL = 0.95
_CELLS_AT_ONCE = 2_000_000

Floats: TypeAlias = NDArray[np.float64]


class Comparison(Value):
    """Candidate compared with a reference. A positive mean says that the candidate is better (its losses are lower)."""

    mean: float
    low: float
    """Lower end of the 95% interval; minus infinity if there are too few examples for one (below 6)."""
    high: float
    method: Literal["bootstrap", "sign_flip"]
    num_examples: int
    p_value: float | None = None
    """Two-sided p-value of the sign-flip test; None for the bootstrap."""
    unit: str = "nats per token"
    over_seeds: bool = False
    """True if the interval includes the variation between seeds."""

    def record(self, against: Control) -> ComparisonRecord:
        """Return the same figures as the record that transfer.json holds."""
        return ComparisonRecord(against=against, **self.model_dump())


def paired_comparison(
    candidate_losses: Sequence[float] | Floats,
    reference_losses: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
    seed: int = 0,
    *,
    unit: str = "nats per token",
    num_resamples: int = NUM_RESAMPLES,
    num_flips: int = NUM_FLIPS,
) -> Comparison:
    """Return the weighted mean of reference - candidate over examples, and its 95% interval.

    From 200 examples up a BCa bootstrap (Efron 1987) over examples; below, the sign-flip test (Fisher 1935) and the
    interval of the differences that it does not reject.

    Args:
        candidate_losses: [n] mean loss of each example, nats per token (for an accuracy: 0 right, 1 wrong).
        reference_losses: [n] of the same examples.
        weights: [n] supervised tokens of each example, so that the mean is the difference of the two corpus losses;
            None gives all examples the same weight.
        seed: Seed of the resampling.

    Raises:
        ValueError: no example, unequal lengths, a figure that is not finite, a weight that is not positive.
    """
    candidate, reference = np.asarray(candidate_losses, float), np.asarray(reference_losses, float)
    weight = np.ones_like(candidate) if weights is None else np.asarray(weights, float)
    _check(candidate, reference, weight)
    difference = reference - candidate
    mean = float(np.average(difference, weights=weight))
    if len(difference) >= BOOTSTRAP_FROM:
        low, high = bootstrap_interval(difference, weight, seed, num_resamples=num_resamples)
        return Comparison(mean=mean, low=low, high=high, method="bootstrap", num_examples=len(difference), unit=unit)
    low, high, p_value = sign_flip_interval(difference, weight, seed, num_flips=num_flips)
    return Comparison(mean=mean, low=low, high=high, method="sign_flip", num_examples=len(difference), p_value=p_value, unit=unit)


def between_trained(comparison: Comparison, gains: OverSeeds | None) -> Comparison:
    """Return a comparison of two trained models whose interval includes the variation between seeds of both trainings.

    An interval over examples knows nothing of what another seed would have brought: with enough examples two seeds of one
    configuration are surely different models. So to the variance over examples comes that of a difference of two trainings,
    2 s^2, with s estimated from the trainings that there are (Student's t for their number) and taken to be the other's.

    Args:
        gains: Gains of the candidate over one reference, by seed; without them the comparison stays as it is.
    """
    if gains is None:
        return comparison
    # half_width is t s / sqrt(n), so this is t sqrt(2) s: the half-width for one difference of two trainings.
    luck = gains.half_width * math.sqrt(2 * len(gains.values))
    low = comparison.mean - math.hypot(comparison.mean - comparison.low, luck)
    high = comparison.mean + math.hypot(comparison.high - comparison.mean, luck)
    return comparison.model_copy(update={"low": low, "high": high, "p_value": None, "over_seeds": True})


def bootstrap_interval(
    difference: Floats, weight: Floats, seed: int, *, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Return the BCa interval of the weighted mean of difference[n].

    Each resample draws n examples with their weights and takes the ratio of the two sums, since the tokens of a
    resample vary too. The acceleration comes from the jackknife (Efron 1987, equation 6.6).
    """
    observed = float(np.average(difference, weights=weight))
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            (weight[drawn] * difference[drawn]).sum(1) / weight[drawn].sum(1)
            for size in _chunks(num_resamples, len(difference))
            for drawn in [rng.integers(0, len(difference), (size, len(difference)))]
        ]
    )
    # All differences are equal: BCa would divide by zero.
    if float(np.ptp(means)) == 0.0:
        return observed, observed
    normal = NormalDist()
    # Ties count half: with few distinct values they would bias the correction.
    share_below = (np.count_nonzero(means < observed) + 0.5 * np.count_nonzero(means == observed)) / num_resamples
    bias = normal.inv_cdf(min(max(float(share_below), 1 / num_resamples), 1 - 1 / num_resamples))
    total, weights = float(weight @ difference), float(weight.sum())
    # Jackknife in one step: the weighted mean without each example.
    left_out = (total - weight * difference) / (weights - weight)
    spread = left_out.mean() - left_out
    cubes, squares = float((spread**3).sum()), float((spread**2).sum())
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0

    def share(z: float) -> float:
        return normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))

    z = normal.inv_cdf((1 + LEVEL) / 2)
    low, high = np.quantile(means, [share(-z), share(z)])
    return float(low), float(high)


def sign_flip_interval(
    difference: Floats, weight: Floats, seed: int, *, num_flips: int = NUM_FLIPS
) -> tuple[float, float, float]:
    """Return (low, high, two-sided p-value) of the sign-flip test on difference[n].

    If the differences are symmetric about t, flipping the signs of any subset of (difference - t) changes nothing.
    A flip gives a sum at least as large as the observed one exactly when the weighted mean of the flipped subset is
    at most t. So the one-sided p-value of t is the share of subsets, the empty one counted, with a mean of at most t,
    and the values of t that are not rejected lie between two order statistics of the subsets' means (Hartigan 1969).
    All subsets up to 14 examples, else `num_flips` random ones beside the empty one.
    """
    means, num_patterns = _subset_means(difference, weight, seed, num_flips)
    at_most, at_least = 1 + int((means <= 0).sum()), 1 + int((means >= 0).sum())
    p_value = min(1.0, 2 * min(at_most, at_least) / num_patterns)
    # Below 6 examples there are fewer than 40 patterns, so no value can be rejected at 5%.
    rank = int((1 - LEVEL) / 2 * num_patterns)
    if rank == 0:
        return -np.inf, np.inf, p_value
    ordered = np.sort(means)
    return float(ordered[rank - 1]), float(ordered[-rank]), p_value


def _subset_means(difference: Floats, weight: Floats, seed: int, num_flips: int) -> tuple[Floats, int]:
    """Return the weighted means of non-empty subsets of the examples, and the number of sign patterns including the empty one.

    A subset that is drawn empty, rarer than one in 30,000 past 14 examples, gets one example.
    """
    n = len(difference)
    if n <= EXACT_UP_TO:
        patterns = np.arange(1, 2**n, dtype=np.int64)[:, None]
        members = np.bitwise_and(np.right_shift(patterns, np.arange(n, dtype=np.int64)), 1).astype(np.float64)
        return (members @ (weight * difference)) / (members @ weight), 2**n
    rng = np.random.default_rng(seed)
    parts: list[Floats] = []
    for size in _chunks(num_flips, n):
        members = rng.integers(0, 2, (size, n)).astype(float)
        empty = members.sum(1) == 0
        # An empty subset has no mean.
        members[empty, rng.integers(0, n)] = 1.0
        parts.append((members @ (weight * difference)) / (members @ weight))
    return np.concatenate(parts), num_flips + 1


def _chunks(total: int, width: int) -> Iterator[int]:
    """Yield sizes that sum to `total`, so that a size x width array stays small."""
    most = max(1, _CELLS_AT_ONCE // width)
    while total > 0:
        yield min(most, total)
        total -= most


def _check(candidate: Floats, reference: Floats, weight: Floats) -> None:
    if not len(candidate):
        raise ValueError("no example to compare on")
    if not candidate.shape == reference.shape == weight.shape or candidate.ndim != 1:
        raise ValueError(f"unequal lengths: candidate {candidate.shape}, reference {reference.shape}, weights {weight.shape}")
    for name, values in (("candidate", candidate), ("reference", reference), ("weights", weight)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{name} of example {int(bad[0])} is {values[bad[0]]}: expected a finite number")
    if (weight <= 0).any():
        raise ValueError(f"weight of example {int(np.flatnonzero(weight <= 0)[0])} is not positive: leave the example out")
