"""The verdict follows from the intervals, and its sentence carries the figures."""

from __future__ import annotations

import math

import pytest

from orchestrator.transfer import Comparison, OverSeeds, over_seeds, verdict
from orchestrator.transfer.records import VerdictKind


def comparison(low: float, high: float, *, num_examples: int = 180, unit: str = "nats per token") -> Comparison:
    middle = (low + high) / 2
    return Comparison(mean=middle, low=low, high=high, method="sign_flip", num_examples=num_examples, p_value=0.01, unit=unit)


@pytest.mark.parametrize(
    ("none", "scratch", "kind"),
    [
        ((0.1, 0.3), None, "positive"),
        ((-0.3, -0.1), None, "negative"),
        ((-0.004, 0.006), None, "no gain"),
        ((-0.1, 0.3), None, "inconclusive"),
        ((0.1, 0.3), (0.2, 0.4), "positive"),
        ((0.1, 0.3), (-0.4, -0.2), "negative"),
        ((0.1, 0.3), (-0.1, 0.2), "inconclusive"),
        ((0.1, 0.3), (-0.001, 0.001), "no gain"),
        ((-0.3, -0.1), (0.2, 0.4), "negative"),
    ],
)
def test_kinds(none: tuple[float, float], scratch: tuple[float, float] | None, kind: VerdictKind) -> None:
    assert verdict(comparison(*none), comparison(*scratch) if scratch else None).kind == kind


def test_the_sentence() -> None:
    found = verdict(comparison(2.04, 2.14), others={"head": comparison(1.23, 1.31)})
    assert found.sentence == "positive: 2.09 ± 0.05 nats better than the base, 1.27 ± 0.04 better than head, on 180 test examples"


def test_a_loss_is_said_as_worse() -> None:
    assert "0.20 ± 0.10 nats worse than the base" in verdict(comparison(-0.3, -0.1)).sentence


def test_an_accuracy_is_said_in_points() -> None:
    assert "31.0 ± 2.0 points of accuracy better" in verdict(comparison(0.29, 0.33, unit="accuracy")).sentence


def test_others_do_not_decide() -> None:
    assert verdict(comparison(0.1, 0.3), others={"head": comparison(-0.5, -0.4)}).kind == "positive"


def test_too_few_examples_are_inconclusive() -> None:
    found = verdict(Comparison(mean=1.0, low=-math.inf, high=math.inf, method="sign_flip", num_examples=4))
    assert found.kind == "inconclusive"
    assert found.sentence == ("inconclusive: 1.00 nats better than the base, on 4 test examples: too few for an interval")


def seeds(*gains: float, unit: str = "nats per token") -> OverSeeds:
    found = over_seeds(range(len(gains)), gains, unit)
    assert found is not None
    return found


def test_seeds_that_agree_leave_a_positive_verdict_and_are_told() -> None:
    found = verdict(comparison(0.35, 0.47), over_seeds=seeds(0.41, 0.42, 0.40))
    assert found.kind == "positive"
    assert found.sentence == (
        "positive: 0.41 ± 0.06 nats better than the base, on 180 test examples; "
        "over 3 seeds, on the same examples, 0.41 ± 0.02 nats better than the base (each alone: +0.41, +0.42, +0.40)"
    )


def test_small_gains_over_seeds_have_the_decimals_that_show_them() -> None:
    said = verdict(comparison(0.0008, 0.0014), over_seeds=seeds(0.0011, 0.0013, 0.0012)).sentence
    assert "0.0012 ± 0.0002 nats better than the base (each alone: +0.0011, +0.0013, +0.0012)" in said
    assert "0.00 ± 0.00 nats better or worse than" in verdict(comparison(-0.1, 0.3), over_seeds=seeds(0.0, 0.0)).sentence


def test_a_small_gain_that_is_split_has_the_decimals_that_show_it() -> None:
    found = verdict(comparison(0.0008, 0.0014), others={"shuffled": comparison(0.0002, 0.0004)})
    assert "of the gain of 0.0011 nats, 0.0003 ± 0.0001 comes from the task" in found.sentence


@pytest.mark.parametrize("gains", [(0.41, -0.3, 0.5), (0.41, -0.5, -0.6, -0.55)], ids=["unlike", "the bundle alone gains"])
def test_seeds_that_hold_no_gain_make_it_inconclusive(gains: tuple[float, ...]) -> None:
    found = verdict(comparison(0.35, 0.47), over_seeds=seeds(*gains))
    assert found.kind == "inconclusive"
    assert found.sentence.startswith("inconclusive: 0.41 ± 0.06 nats better than the base")
    assert found.sentence.endswith("): inconclusive, since another seed could give a different result")


@pytest.mark.parametrize(
    ("failed", "said"), [(1, "from 1 other seed training failed"), (4, ("from 4 other seeds training failed"))]
)
def test_a_seed_from_which_training_failed_could_have_been_the_bundles(failed: int, said: str) -> None:
    """Those that came through are no fair sample of what might have been."""
    survivors = seeds(0.41, 0.42, 0.40) if failed == 1 else None
    found = verdict(comparison(0.35, 0.47), over_seeds=survivors, failed_seeds=failed)
    assert found.kind == "inconclusive"
    assert said in found.sentence
    assert verdict(comparison(-0.3, -0.1), failed_seeds=failed).kind == "negative"


@pytest.mark.parametrize(
    ("low", "high", "kind"), [(-0.3, -0.1, "negative"), (-0.004, 0.006, "no gain"), (-0.1, 0.3, "inconclusive")]
)
def test_seeds_mend_no_verdict(low: float, high: float, kind: VerdictKind) -> None:
    for gains in ((0.4, 0.41, 0.42), (0.4, -0.4)):
        assert verdict(comparison(low, high), over_seeds=seeds(*gains)).kind == kind


def test_accuracies_over_seeds_are_said_in_points() -> None:
    said = verdict(comparison(0.29, 0.33, unit="accuracy"), over_seeds=seeds(0.31, 0.30, unit="accuracy")).sentence
    assert (
        "over 2 seeds, on the same examples, 30.5 ± 6.4 points of accuracy better than the base (each alone: +31.0, +30.0)"
        in said
    )
