"""Layers by learning rate, at equal budgets."""

from __future__ import annotations

import math

from orchestrator.report.matrix import MAX_BUDGETS, MAX_COLUMNS, budgets_of, rate_matrices


def last_of(trials, higher_is_better=False, order=()):
    """The matrices of the largest budget."""
    return rate_matrices(trials, higher_is_better, order)[-1]


def test_few_rates_are_columns_themselves_and_the_best_of_a_cell_counts(make):
    good, bad = make.trial(0, "last:2", "lora", 8, 1e-3), make.trial(1, "last:2", "lora", 16, 1e-3)
    worse = bad.model_copy(update={"rungs": tuple(rung.model_copy(update={"metric": rung.metric + 0.5}) for rung in bad.rungs)})
    other = make.trial(2, "all", "lora", 8, 3e-4)
    (matrix,) = last_of([worse, good, other, make.control("head")], order=["all", "last:2"])
    assert matrix.rows == ("all", "last:2")
    assert matrix.columns == ("3.0e-04", "1.0e-03")
    assert matrix.values == ((other.metric, None), (None, good.metric))
    assert matrix.counts == ((1, 0), (0, 2))
    (matrix,) = last_of([worse, good], higher_is_better=True)
    assert matrix.values == ((worse.metric,),)


def test_trials_are_compared_at_equal_budgets_alone(make):
    """The stopped trial's loss after 6 steps never stands beside the other's after 54."""
    stopped = make.trial(2, "last:2", "lora", 8, 1e-3, state="stopped")
    whole = make.trial(1, "all", "lora", 8, 3e-4)
    assert [rung.step for rung in stopped.rungs] == [6]
    first, middle, last = (panels[0] for panels in rate_matrices([stopped, whole], False))
    assert (first.step, middle.step, last.step) == (6, 18, 54)
    assert first.values == ((None, stopped.metric), (whole.rungs[0].metric, None))
    assert last.values == ((None, None), (whole.metric, None))
    assert last.tried == ((0, 1), (1, 0))
    assert last.counts == ((0, 0), (1, 0))


def test_of_many_budgets_the_first_one_in_the_middle_and_the_last_are_shown(make):
    trial = make.trial(0, "all", "lora", 8, 1e-3)
    rungs = tuple(trial.rungs[0].model_copy(update={"rung": n, "step": 10 * (n + 1)}) for n in range(9))
    steps = budgets_of([trial.model_copy(update={"rungs": rungs})])
    assert steps == (10, 50, 90)
    assert len(steps) == MAX_BUDGETS


def test_many_rates_share_columns_of_equal_logarithmic_width(make):
    trials = [make.trial(n, "all", "full", None, 1e-5 * 10 ** (n / 10)) for n in range(21)]
    (matrix,) = last_of(trials)
    assert len(matrix.columns) == len(matrix.ranges) == MAX_COLUMNS
    assert sum(matrix.counts[0]) == 21
    assert matrix.ranges[0].startswith("1.0e-05 to")
    assert matrix.ranges[-1].endswith("to 1.0e-03")


def test_a_failed_trial_gives_way_to_any_other(make):
    failed = make.trial(0, "all", "full", None, 1e-4, state="failed")
    done = make.trial(1, "all", "full", None, 1e-4)
    for order in ([failed, done], [done, failed]):
        (matrix,) = last_of(order)
        assert matrix.values == ((done.metric,),)
    (matrix,) = last_of([failed])
    assert math.isnan(matrix.values[0][0])


def test_lora_and_full_share_their_rows(make):
    lora, full = make.trial(0, "last:2", "lora", 8, 1e-3), make.trial(1, "all", "full", None, 1e-4)
    matrices = last_of([lora, full])
    assert [matrix.title for matrix in matrices] == ["lora", "full"]
    assert {matrix.rows for matrix in matrices} == {("last:2", "all")}
