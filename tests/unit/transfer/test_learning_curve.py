"""Learning curves: a law that is there is found, a flat one promises nothing, and noise widens the interval."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.transfer.learning_curve import AHEAD, LearningCurve, PowerLaw, fit_power_law, learning_curve

COUNTS = [50, 100, 200, 400, 800]


@pytest.mark.parametrize(("floor", "scale", "power"), [(1.5, 8.0, 0.5), (0.0, 4.0, 0.25), (2.0, 100.0, 1.0)])
def test_a_law_without_noise_is_found(floor: float, scale: float, power: float) -> None:
    numbers = np.asarray(COUNTS, float)
    law = fit_power_law(numbers, floor + scale * numbers**-power)
    assert law.at(1600) == pytest.approx(floor + scale * 1600**-power, abs=2e-3)


@pytest.mark.parametrize("losses", [[2.0, 2.0, 2.0, 2.0, 2.0], [1.8, 1.9, 2.0, 2.1, 2.2]])
def test_a_curve_that_does_not_fall_promises_nothing(losses: list[float]) -> None:
    law = fit_power_law(np.asarray(COUNTS, float), np.asarray(losses))
    assert law.scale == pytest.approx(0.0, abs=1e-9)
    assert law.at(1e6) == pytest.approx(np.mean(losses))


def noisy(seed: int, luck: float, floor: float = 1.5, num_documents: int = 100) -> tuple[list[np.ndarray], float]:
    """(document losses at COUNTS, true loss on these documents at twice the data).

    Documents are hard or easy for every model alike, and a little harder or easier for each; each training has its luck.
    """
    generator = np.random.default_rng(seed)
    hardness = generator.normal(0, 0.5, num_documents)

    def law(count: float) -> float:
        return floor + 8.0 * count**-0.5

    trained = [law(count) + generator.normal(0, luck) for count in COUNTS]
    losses = [mean + hardness + generator.normal(0, 0.08, num_documents) for mean in trained]
    return losses, law(AHEAD * COUNTS[-1]) + float(hardness.mean())


def test_the_interval_holds_the_truth_whatever_the_luck_of_the_trainings() -> None:
    widths: list[float] = []
    for luck in (0.0, 0.01, 0.04):
        made = [noisy(seed, luck) for seed in range(120)]
        curves = [learning_curve("t000", COUNTS, losses, np.ones(100), seed) for seed, (losses, _) in enumerate(made)]
        held = sum(curve.low <= truth <= curve.high for curve, (_, truth) in zip(curves, made, strict=True))
        assert held >= 108, (luck, held)
        widths.append(float(np.median([curve.high - curve.low for curve in curves])))
    assert widths == sorted(widths)


def test_a_gain_that_is_plain_is_told_and_none_is_made_up() -> None:
    flat = np.random.default_rng(0).normal(2.0, 0.3, 100)
    wrong = right = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        curve = learning_curve("t000", COUNTS, [flat + generator.normal(0, 0.08, 100) for _ in COUNTS], np.ones(100), seed)
        wrong += "would bring" in curve.sentence
        right += "would bring" in learning_curve("t000", COUNTS, noisy(seed, 0.005)[0], np.ones(100), seed).sentence
    assert wrong <= 3
    assert right >= 45


def test_what_is_told_is_what_was_measured() -> None:
    (losses, _), weights = noisy(0, 0.01), np.linspace(1, 5, 100)
    curve = learning_curve("t000", COUNTS, losses, weights, seed=0)
    assert curve.losses == pytest.approx([np.average(each, weights=weights) for each in losses])
    assert curve.ahead_count == 1600
    assert curve.gain == pytest.approx(curve.losses[-1] - curve.ahead_loss)
    assert curve == learning_curve("t000", COUNTS, losses, weights, seed=0)
    with pytest.raises(ValueError, match="4 or more"):
        learning_curve("t000", COUNTS[:3], losses[:3], weights, seed=0)


def test_a_law_that_misses_the_last_point_excludes_no_gain() -> None:
    """A loss that falls ever faster fits no power law: the law lies above the last point, and the interval reaches far below."""
    offsets = np.random.default_rng(0).normal(0, 0.5, 100)
    losses = [mean + offsets - offsets.mean() for mean in (2.983, 2.980, 2.973, 2.934, 2.833)]
    curve = learning_curve("t000", COUNTS, losses, np.ones(100), seed=0)
    assert curve.gain < 0
    assert curve.sentence.startswith("the learning curve could not be fitted: its law gives 2.842")


def curve_to(ahead: float, low: float, high: float, scale: float = 8.0) -> LearningCurve:
    return LearningCurve(
        trial_id="t000",
        counts=(108, 216, 432, 864),
        losses=(2.3, 2.1, 1.95, 1.83),
        law=PowerLaw(floor=1.5, scale=scale, power=0.5),
        ahead_count=1728,
        ahead_loss=ahead,
        low=low,
        high=high,
    )


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (
            curve_to(1.79, 1.75, 1.82),
            "twice the data (1728 documents) would bring the loss from 1.830 to about 1.790 (95%: 1.750 to 1.820)",
        ),
        (
            curve_to(1.79, 1.75, 1.83),
            "it cannot be determined whether more data would help: the loss is 1.830, and with twice the data (1728 "
            "documents) it would "
            "be about 1.790 (95%: 1.750 to 1.830)",
        ),
        (
            curve_to(1.9, 1.85, 1.95, scale=0.0),
            "the learning curve could not be fitted: its law gives 1.900 with twice the data (1728 documents), worse than the "
            "1.830 that was measured with all documents; it does not show whether more data would help",
        ),
        (
            curve_to(1.829, 1.821, 1.84),
            "no gain is expected from more data: the loss is 1.830, and with twice the data (1728 documents) it would be "
            "about 1.829 (95%: 1.821 to 1.840)",
        ),
        (
            curve_to(1.8304, 1.819, 1.95, scale=0.0),
            "it cannot be determined whether more data would help: the loss is 1.830, and with twice the data (1728 "
            "documents) it would "
            "be about 1.830 (95%: 1.819 to 1.950)",
        ),
    ],
    ids=["more data helps", "the interval holds the present loss", "the fit failed", "no gain that matters", "as good as now"],
)
def test_the_sentence_follows_from_the_interval(curve: LearningCurve, said: str) -> None:
    assert curve.sentence == said
