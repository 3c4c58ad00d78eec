"""Student's interval over seeds, against tables and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.transfer import over_seeds
from orchestrator.transfer.seeds import student_t_quantile


@pytest.mark.parametrize(
    ("degrees", "level", "expected"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (3, 0.95, 3.1824),
        (4, 0.95, 2.7764),
        (9, 0.95, 2.2622),
        (30, 0.95, 2.0423),
        (1, 0.5, 1.0),
        (4, 0.99, 4.6041),
    ],
)
def test_quantiles_are_those_of_the_tables(degrees: int, level: float, expected: float) -> None:
    assert student_t_quantile(degrees, level) == pytest.approx(expected, abs=5e-5)


def test_mean_and_interval_by_hand() -> None:
    found = over_seeds([0, 1, 2], [1.0, 2.0, 3.0], "nats per token")
    assert found is not None
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert found.low == pytest.approx(2 - found.half_width)


def test_a_seed_without_a_finite_figure_does_not_count_and_one_alone_has_no_interval() -> None:
    found = over_seeds([0, 1, 2], [1.0, float("nan"), 3.0])
    assert found is not None
    assert (found.seeds, found.values) == ((0, 2), (1.0, 3.0))
    assert over_seeds([0], [1.0]) is None
    assert over_seeds([0, 1], [1.0, float("inf")]) is None
    with pytest.raises(ValueError, match="unequal lengths: 1 seeds and 2 values"):
        over_seeds([0], [1.0, 2.0])


@pytest.mark.parametrize("count", [2, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says(count: int) -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        found = over_seeds(range(count), generator.normal(0.3, 0.2, count).tolist())
        assert found is not None
        covered += found.low <= 0.3 <= found.high
    assert 0.935 <= covered / 2000 <= 0.965
