"""The search's one number: lower is better, always finite."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.transfer import FORGETTING_WEIGHT, WORST_SCORE, forgetting, score


@pytest.mark.parametrize(
    ("value", "higher", "lost", "expected"),
    [
        (1.8, False, None, 1.8),
        (1.8, False, 0.1, 1.8),
        (1.8, False, -0.5, 1.8),
        (1.8, False, 0.3, 1.8 + FORGETTING_WEIGHT * 0.2),
        (0.7, True, 0.05, 0.3),
        (0.7, True, 0.2, 0.3 + FORGETTING_WEIGHT * 0.1),
    ],
)
def test_target_plus_penalty_beyond_the_bound(value: float, higher: bool, lost: float | None, expected: float) -> None:
    assert score(value, higher, lost, bound=0.1) == pytest.approx(expected)


@given(
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    st.none() | st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0, 10),
)
def test_a_score_is_finite_whatever_came_in(value: float, higher: bool, lost: float | None, bound: float) -> None:
    assert math.isfinite(score(value, higher, lost, bound))
    assert score(value, higher, lost, bound) <= WORST_SCORE


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_retention_loss_that_broke_is_the_worst(lost: float) -> None:
    assert score(1.0, False, lost, 0.1) == WORST_SCORE


def test_forgetting_is_the_rise_over_the_base() -> None:
    assert forgetting(3.25, 3.0) == pytest.approx(0.25)
    assert forgetting(2.9, 3.0) == pytest.approx(-0.1)
