"""Mean of a figure over several seeds, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from orchestrator.values import Value

LEVEL = 0.95


class OverSeeds(Value):
    """One figure from several seeds, with mean and interval."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """One value per seed."""
    mean: float
    low: float
    """Lower end of the 95% interval of the mean."""
    high: float
    unit: str = ""

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def over_seeds(seeds: Sequence[int], values: Sequence[float], unit: str = "") -> OverSeeds | None:
    """Return the mean of values[n], one per seed, with Student's t interval (Student 1908, "The probable error of a mean").

    It takes the seeds' figures as drawn from one normal distribution; it knows nothing of how few the examples are that each was
    measured on.

    Returns:
        None where fewer than two seeds came to a finite figure.

    Raises:
        ValueError: unequal lengths.
    """
    if len(seeds) != len(values):
        raise ValueError(f"unequal lengths: {len(seeds)} seeds and {len(values)} values")
    pairs = [(seed, value) for seed, value in zip(seeds, values, strict=True) if math.isfinite(value)]
    if len(pairs) < 2:
        return None
    found = np.asarray([value for _, value in pairs])
    # ddof=1: the spread is estimated from the same few values as the mean.
    half = student_t_quantile(len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    mean = float(found.mean())
    return OverSeeds(
        seeds=tuple(seed for seed, _ in pairs),
        values=tuple(value for _, value in pairs),
        mean=mean,
        low=mean - half,
        high=mean + half,
        unit=unit,
    )


def student_t_quantile(degrees: int, level: float = LEVEL) -> float:
    """Return the t with P(|T| < t) = `level`, for Student's distribution with the given degrees of freedom."""
    low, high = 0.0, 1.0
    # Bisection instead of SciPy: transfer depends on NumPy only.
    while _within(high, degrees) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """Return P(|T| < t) by the finite series of Abramowitz & Stegun 1964, 26.7.3 (odd degrees) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    term, total = 1.0, 0.0
    if degrees % 2:
        term = math.cos(angle)
        for k in range(3, degrees + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k - 1) / k
        return 2 / math.pi * (angle + math.sin(angle) * total)
    for k in range(2, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    return math.sin(angle) * total
