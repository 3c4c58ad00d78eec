"""Layers by learning rate."""

from __future__ import annotations

import math

from orchestrator.report.matrix import MAX_COLUMNS, rate_matrices


def test_few_rates_are_columns_themselves_and_the_best_of_a_cell_counts(make):
    good, bad = make.trial(0, "last:2", "lora", 8, 1e-3), make.trial(1, "last:2", "lora", 16, 1e-3, state="stopped")
    other = make.trial(2, "all", "lora", 8, 3e-4)
    (matrix,) = rate_matrices([bad, good, other, make.control("head")], higher_is_better=False, order=["all", "last:2"])
    assert matrix.rows == ("all", "last:2")
    assert matrix.columns == ("3.0e-04", "1.0e-03")
    assert matrix.values == ((other.metric, None), (None, good.metric))
    assert matrix.counts == ((1, 0), (0, 2))
    (matrix,) = rate_matrices([bad, good], higher_is_better=True)
    assert matrix.values == ((bad.metric,),)


def test_many_rates_share_columns_of_equal_logarithmic_width(make):
    trials = [make.trial(n, "all", "full", None, 1e-5 * 10 ** (n / 10)) for n in range(21)]
    (matrix,) = rate_matrices(trials, higher_is_better=False)
    assert len(matrix.columns) == len(matrix.ranges) == MAX_COLUMNS
    assert sum(matrix.counts[0]) == 21
    assert matrix.ranges[0].startswith("1.0e-05 to")
    assert matrix.ranges[-1].endswith("to 1.0e-03")


def test_a_failed_trial_gives_way_to_any_other(make):
    failed = make.trial(0, "all", "full", None, 1e-4, state="failed")
    done = make.trial(1, "all", "full", None, 1e-4)
    for order in ([failed, done], [done, failed]):
        (matrix,) = rate_matrices(order, higher_is_better=False)
        assert matrix.values == ((done.metric,),)
    (matrix,) = rate_matrices([failed], higher_is_better=False)
    assert math.isnan(matrix.values[0][0])


def test_lora_and_full_share_their_rows(make):
    lora, full = make.trial(0, "last:2", "lora", 8, 1e-3), make.trial(1, "all", "full", None, 1e-4)
    matrices = rate_matrices([lora, full], higher_is_better=False)
    assert [matrix.title for matrix in matrices] == ["lora", "full"]
    assert {matrix.rows for matrix in matrices} == {("last:2", "all")}
