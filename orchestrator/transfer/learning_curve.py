"""Would more data help: losses at growing shares of the data, a power law through them, and where it goes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.values import Value

Floats = NDArray[np.float64]
SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of the training data, at which a curve is measured."""
AHEAD = 2.0
"""How many times the data there is the curve is followed to."""
POWERS = np.linspace(0.05, 1.5, 59)
"""Exponents that are tried. Published ones lie between 0.05 and 0.7 (Hestness et al. 2017, "Deep learning scaling is
predictable, empirically")."""
NUM_RESAMPLES = 400
LEVEL = 0.95


class PowerLaw(Value):
    """loss(n) = floor + scale n^-power, of n training documents."""

    floor: float
    scale: float
    power: float

    def at(self, count: float) -> float:
        return self.floor + self.scale * count**-self.power


class LearningCurve(Value):
    """A promoted trial trained on growing shares."""

    counts: tuple[int, ...]
    """Training documents, ascending."""
    losses: tuple[float, ...]
    """On the eval set, nats per token."""
    law: PowerLaw
    ahead_count: int
    """AHEAD times the largest of `counts`."""
    ahead_loss: float
    """What the law says there."""
    low: float
    """Lower end of the 95% interval of `ahead_loss`, over the documents of the eval set."""
    high: float

    @property
    def gain(self) -> float:
        """Nats per token that AHEAD times the data would bring, by the law."""
        return self.losses[-1] - self.ahead_loss


def fit_power_law(counts: Floats, losses: Floats) -> PowerLaw:
    """Least squares over floor >= 0, scale >= 0 and POWERS.

    Args:
        counts: float[k], at least three different numbers above 0.
        losses: float[k].
    """
    best: tuple[float, PowerLaw] | None = None
    for power in POWERS:
        floor, scale = _line(counts**-power, losses)
        error = float(np.square(floor + scale * counts**-power - losses).sum())
        if best is None or error < best[0] - 1e-15:
            best = error, PowerLaw(floor=floor, scale=scale, power=float(power))
    assert best is not None
    return best[1]


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """(floor, scale), both at least 0, of the nearest floor + scale x."""
    spread = x - x.mean()
    scale = float(spread @ (y - y.mean()) / (spread @ spread))
    floor = float(y.mean() - scale * x.mean())
    if scale < 0:
        return max(0.0, float(y.mean())), 0.0
    return (floor, scale) if floor >= 0 else (0.0, max(0.0, float(x @ y / (x @ x))))


def learning_curve(counts: Sequence[int], document_losses: Sequence[Floats], weights: Floats, seed: int) -> LearningCurve:
    """The curve through the models' losses on one eval set, and where AHEAD times the data would bring it.

    The interval comes from drawing the eval set's documents anew, the same ones for every share: it knows how few they are, and
    not that another draw of the training data would have trained other models.

    Args:
        counts: Training documents of each share, ascending.
        document_losses: For each share float[D], mean loss of each eval document, nats per token.
        weights: float[D], supervised tokens of each.
        seed: Of the draws.

    Raises:
        ValueError: fewer than three shares, or unequal lengths.
    """
    if len(counts) < 3 or len(counts) != len(document_losses) or any(len(each) != len(weights) for each in document_losses):
        raise ValueError(f"{len(counts)} shares with {[len(each) for each in document_losses]} losses: expected 3 or more, alike")
    numbers, losses = np.asarray(counts, float), np.stack(document_losses)
    ahead = round(AHEAD * counts[-1])
    law = fit_power_law(numbers, losses @ weights / weights.sum())
    random = np.random.default_rng(seed)
    drawn = random.integers(0, len(weights), (NUM_RESAMPLES, len(weights)))
    means = [(losses[:, rows] @ weights[rows]) / weights[rows].sum() for rows in drawn]
    reached = [fit_power_law(numbers, mean).at(ahead) for mean in means]
    low, high = np.quantile(reached, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return LearningCurve(
        counts=tuple(counts),
        losses=tuple(float(loss) for loss in losses @ weights / weights.sum()),
        law=law,
        ahead_count=ahead,
        ahead_loss=law.at(ahead),
        low=float(low),
        high=float(high),
    )
