"""Spearman's correlation and its interval, against hand-made cases and a simulation."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.transfer import rank_correlation


def test_ranks_alone_count() -> None:
    found = rank_correlation([1, 2, 3, 4, 5, 6], [1, 10, 1e2, 1e3, 1e5, 1e4])
    assert found is not None
    assert found.value == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert found.low < found.value < found.high


def test_equal_values_share_their_ranks() -> None:
    found = rank_correlation([1, 1, 2, 2], [3, 3, 1, 2])
    assert found is not None
    assert found.value == pytest.approx(np.corrcoef([1.5, 1.5, 3.5, 3.5], [3.5, 3.5, 1, 2])[0, 1])


@pytest.mark.parametrize(("first", "second"), [([1, 2, 3], [3, 2, 1]), ([], []), ([1] * 9, range(9)), (range(9), [2] * 9)])
def test_too_few_or_all_alike_tell_nothing(first: list[float], second: list[float]) -> None:
    assert rank_correlation(first, second) is None


def test_four_pairs_that_agree_by_chance_are_no_proof() -> None:
    found = rank_correlation([1, 2, 3, 4], [8, 6, 4, 2])
    assert found is not None
    assert found.value == pytest.approx(-1)
    assert found.low == pytest.approx(-1)
    assert found.high > 0
    many = rank_correlation(range(30), range(30))
    assert many is not None
    assert many.low > 0.9


@pytest.mark.parametrize(("first", "second"), [([1, 2], [1]), ([1, 2, 3, float("nan")], [1, 2, 3, 4])])
def test_what_cannot_be_ranked_is_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match=r"unequal|finite"):
        rank_correlation(first, second)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(strength: float) -> None:
    """Normal pairs of this correlation have a Spearman correlation of 6/pi asin(r/2) (Pearson 1907)."""
    truth, generator, covered = 6 / np.pi * np.arcsin(strength / 2), np.random.default_rng(1), 0
    for _ in range(400):
        first = generator.normal(size=25)
        second = strength * first + np.sqrt(1 - strength**2) * generator.normal(size=25)
        found = rank_correlation(first.tolist(), second.tolist())
        assert found is not None
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 400 <= 0.99
