"""Learning curves: a law that is there is found, a flat one promises nothing, and noise widens the interval."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.transfer.learning_curve import AHEAD, fit_power_law, learning_curve

COUNTS = [100, 200, 400, 800]


@pytest.mark.parametrize(("floor", "scale", "power"), [(1.5, 8.0, 0.5), (0.0, 4.0, 0.25), (2.0, 100.0, 1.0)])
def test_a_law_without_noise_is_found(floor: float, scale: float, power: float) -> None:
    numbers = np.asarray(COUNTS, float)
    law = fit_power_law(numbers, floor + scale * numbers**-power)
    assert law.at(1600) == pytest.approx(floor + scale * 1600**-power, abs=2e-3)


@pytest.mark.parametrize("losses", [[2.0, 2.0, 2.0, 2.0], [1.8, 1.9, 2.0, 2.1]])
def test_a_curve_that_does_not_fall_promises_nothing(losses: list[float]) -> None:
    law = fit_power_law(np.asarray(COUNTS, float), np.asarray(losses))
    assert law.scale == pytest.approx(0.0, abs=1e-9)
    assert law.at(1e6) == pytest.approx(np.mean(losses))


def noisy(seed: int, spread: float, num_documents: int = 200) -> list[np.ndarray]:
    """Documents that are hard or easy for every model alike, and a little harder or easier for each."""
    generator = np.random.default_rng(seed)
    hardness = generator.normal(0, 0.5, num_documents)
    return [1.5 + 8.0 * count**-0.5 + hardness + generator.normal(0, spread, num_documents) - hardness.mean() for count in COUNTS]


def test_the_interval_holds_the_truth_and_widens_with_noise() -> None:
    truth = 1.5 + 8.0 * (AHEAD * COUNTS[-1]) ** -0.5
    widths = []
    for spread in (0.02, 0.3):
        curves = [learning_curve(COUNTS, noisy(seed, spread), np.ones(200), seed) for seed in range(12)]
        assert sum(curve.low <= truth <= curve.high for curve in curves) >= 10
        widths.append(np.mean([curve.high - curve.low for curve in curves]))
    assert widths[1] > widths[0]


def test_what_is_told_is_what_was_measured() -> None:
    losses, weights = noisy(0, 0.1), np.linspace(1, 5, 200)
    curve = learning_curve(COUNTS, losses, weights, seed=0)
    assert curve.losses == pytest.approx([np.average(each, weights=weights) for each in losses])
    assert curve.ahead_count == 1600
    assert curve.gain == pytest.approx(curve.losses[-1] - curve.ahead_loss)
    assert curve == learning_curve(COUNTS, losses, weights, seed=0)
    with pytest.raises(ValueError, match="3 or more"):
        learning_curve(COUNTS[:2], losses[:2], weights, seed=0)
