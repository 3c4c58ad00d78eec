"""Learning curve: losses at growing shares of the data, a power law fitted to them, and its extrapolation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.transfer.scoring import SMALLEST_GAIN
from orchestrator.values import Value

Floats = NDArray[np.float64]
AHEAD = 2
"""Factor on the number of training documents to which the curve is extrapolated."""
POWERS = np.linspace(0.05, 1.5, 59)
"""Exponents that the fit tries. Published ones lie between 0.05 and 0.7 (Hestness et al. 2017, "Deep learning scaling is
predictable, empirically")."""
NUM_IN_LAW = 3
"""Number of parameters of a power law."""
NUM_RESAMPLES = 400
LEVEL = 0.95


class PowerLaw(Value):
    """loss(n) = floor + scale * n^-power, for n training documents."""

    floor: float
    scale: float
    power: float

    def at(self, count: float) -> float:
        return self.floor + self.scale * count**-self.power


class LearningCurve(Value):
    """Losses of the promoted trial, trained on growing shares of the data."""

    trial_id: str
    counts: tuple[int, ...]
    """Training documents of each share, ascending; the last is the full set."""
    losses: tuple[float, ...]
    """Losses on the eval set, nats per token."""
    law: PowerLaw
    ahead_count: int
    """AHEAD times the largest of `counts`."""
    ahead_loss: float
    """Loss extrapolated to `ahead_count`."""
    low: float
    """Lower end of the 95% interval of `ahead_loss`, relative to the measured loss on all documents."""
    high: float

    @property
    def gain(self) -> float:
        """Predicted gain, nats per token, from AHEAD times the data."""
        return self.losses[-1] - self.ahead_loss

    @property
    def fit_failed(self) -> bool:
        """True if the law predicts a worse loss for more data than was measured, in the digits shown."""
        # Compared as displayed, so that the sentence never contradicts its own figures.
        return float(f"{self.ahead_loss:.3f}") > float(f"{self.losses[-1]:.3f}")

    @property
    def sentence(self) -> str:
        """One sentence on whether more data would help: `no gain` only if the interval excludes a gain that matters."""
        there = f"twice the data ({self.ahead_count} documents)"
        if self.fit_failed:
            return (
                f"the learning curve could not be fitted: its law gives {self.ahead_loss:.3f} with {there}, worse than the "
                f"{self.losses[-1]:.3f} that was measured with all documents; it does not show whether more data would help"
            )
        now, reached = f"{self.losses[-1]:.3f}", f"about {self.ahead_loss:.3f} (95%: {self.low:.3f} to {self.high:.3f})"
        if self.high < self.losses[-1]:
            return f"{there} would bring the loss from {now} to {reached}"
        if self.losses[-1] - self.low < SMALLEST_GAIN:
            return f"no gain is expected from more data: the loss is {now}, and with {there} it would be {reached}"
        return f"it cannot be determined whether more data would help: the loss is {now}, and with {there} it would be {reached}"


def fit_power_law(counts: Floats, losses: Floats) -> PowerLaw:
    """Fit a power law by least squares over floor >= 0, scale >= 0 and POWERS.

    Args:
        counts: float[k], at least three different numbers above 0.
        losses: float[k], none below 0.
    """
    floor, scale, power = (float(values[0]) for values in _fit(counts, losses[None]))
    return PowerLaw(floor=floor, scale=scale, power=power)


def _fit(counts: Floats, losses: Floats) -> tuple[Floats, Floats, Floats]:
    """Return (floor, scale, power), float[R] each, for losses float[R, k]: the nearest line in n^-power, for the best of
    POWERS."""
    # For a fixed exponent the law is linear in n^-power: least squares has a closed form for each, and the best is taken.
    x = counts ** -POWERS[:, None]
    mean_x, mean_y = x.mean(axis=1), losses.mean(axis=1, keepdims=True)
    spread = x - mean_x[:, None]
    slope = (losses - mean_y) @ spread.T / np.square(spread).sum(axis=1)  # [R, P]
    # Constraints: a rising curve becomes a constant, and a negative floor a line through the origin.
    falling = slope > 0
    through_zero = mean_y < slope * mean_x
    slope_at_zero: Floats = losses @ x.T / np.square(x).sum(axis=1)
    scale = np.where(falling, np.where(through_zero, slope_at_zero, slope), 0.0)
    floor = np.where(falling & through_zero, 0.0, mean_y - scale * mean_x)
    errors = np.square(floor[..., None] + scale[..., None] * x - losses[:, None, :]).sum(axis=2)
    each, best = np.arange(len(losses)), errors.argmin(axis=1)
    return floor[each, best], scale[each, best], POWERS[best]


def learning_curve(
    trial_id: str, counts: Sequence[int], document_losses: Sequence[Floats], weights: Floats, seed: int
) -> LearningCurve:
    """Return the curve through a trial's losses on one eval set, and its extrapolation to AHEAD times the data.

    The interval is of the gain beyond the loss on all documents, from laws fitted to the points as they might have been. The
    eval set's documents are drawn anew, the same ones for every share, so that documents that are hard for all alike do not
    widen it. And every point is moved at random, since another draw of the training documents would have trained another
    model: by the points' spread around the law, itself drawn from what so few of them leave open (its inverse chi-squared
    posterior). In simulations with known laws (tests/unit/transfer/test_learning_curve.py) it holds the truth in nine cases
    of ten or more.

    Args:
        counts: Training documents of each share, ascending.
        document_losses: For each share float[D], mean loss of each eval document, nats per token.
        weights: float[D], supervised tokens of each.
        seed: Seed of the draws.

    Raises:
        ValueError: fewer than four shares, or unequal lengths.
    """
    alike = len(counts) == len(document_losses) and all(len(each) == len(weights) for each in document_losses)
    if len(counts) <= NUM_IN_LAW or not alike:
        raise ValueError(f"{len(counts)} shares with {[len(each) for each in document_losses]} losses: expected 4 or more, alike")
    numbers, weighted = np.asarray(counts, float), np.stack(document_losses) * weights
    losses, ahead = weighted.sum(axis=1) / weights.sum(), AHEAD * counts[-1]
    law, random = fit_power_law(numbers, losses), np.random.default_rng(seed)
    # The same documents for every share, so that documents that are hard for all of them do not widen the interval.
    drawn = random.integers(0, len(weights), (NUM_RESAMPLES, len(weights)))
    means = weighted[:, drawn].sum(axis=2).T / weights[drawn].sum(axis=1, keepdims=True)  # [R, k]
    misses: Floats = losses - np.asarray([law.at(count) for count in counts])
    # k points minus 3 parameters leave few degrees of freedom: the spread itself is uncertain, and drawn too.
    left_open: Floats = random.chisquare(len(counts) - NUM_IN_LAW, (NUM_RESAMPLES, 1))
    luck = random.normal(0.0, float(np.linalg.norm(misses)) * left_open**-0.5, means.shape)
    # A loss is never negative.
    floor, scale, power = _fit(numbers, np.maximum(means + luck, 0.0))
    gains = means[:, -1] - (floor + scale * ahead**-power)
    low, high = losses[-1] - np.quantile(gains, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    return LearningCurve(
        trial_id=trial_id,
        counts=tuple(counts),
        losses=tuple(float(loss) for loss in losses),
        law=law,
        ahead_count=ahead,
        ahead_loss=law.at(ahead),
        low=float(low),
        high=float(high),
    )
