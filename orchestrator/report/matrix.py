"""Matrices of layers by learning rate, for lora and full, at one budget each.

Trials are compared only at equal budgets: a loss after 37 steps is not comparable with one after 327.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.transfer.records import TrialRecord

MAX_COLUMNS = 7
MAX_BUDGETS = 3
"""Number of budgets shown; of more, the first, a middle one and the last."""


@dataclass(frozen=True)
class RateMatrix:
    """Best metric per cell of the trials that were evaluated at `step`."""

    title: str
    step: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    """Learning rates, or the middle of each of seven equal steps of their logarithm."""
    ranges: tuple[str, ...]
    """Range of each column."""
    values: tuple[tuple[float | None, ...], ...]
    """None if no trial was evaluated at this step, NaN if every trial failed."""
    counts: tuple[tuple[int, ...], ...]
    """Trials of each cell that were evaluated at this step, or failed."""
    tried: tuple[tuple[int, ...], ...]
    """Trials of each cell, including those that have not reached this step."""


def budgets_of(trials: Sequence[TrialRecord]) -> tuple[int, ...]:
    """Return the steps at which searched trials were evaluated, ascending; at most MAX_BUDGETS."""
    steps = sorted({rung.step for trial in trials if trial.control is None for rung in trial.rungs if rung.metric is not None})
    if len(steps) <= MAX_BUDGETS:
        return tuple(steps)
    return steps[0], steps[len(steps) // 2], steps[-1]


def rate_matrices(
    trials: Sequence[TrialRecord], higher_is_better: bool, order: Sequence[str] = ()
) -> list[tuple[RateMatrix, ...]]:
    """Return for each budget one matrix per training method that was searched, all with the same rows.

    Args:
        order: Layer policies in the order of the spec; others follow in the order of their trials.
    """
    searched = [trial for trial in trials if trial.control is None]
    tried = [trial.layers for trial in searched]
    rows = tuple(dict.fromkeys([*(layers for layers in order if layers in tried), *tried]))
    by_tune = {tune: chosen for tune in ("lora", "full") if (chosen := [trial for trial in searched if trial.tune == tune])}
    steps = budgets_of(searched) or (0,)
    return [tuple(_matrix(tune, step, rows, chosen, higher_is_better) for tune, chosen in by_tune.items()) for step in steps]


def _matrix(tune: str, step: int, rows: tuple[str, ...], trials: list[TrialRecord], higher_is_better: bool) -> RateMatrix:
    columns, ranges, column_of = _columns([trial.learning_rate for trial in trials])
    values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    counts, tried = [[0] * len(columns) for _ in rows], [[0] * len(columns) for _ in rows]
    for trial in trials:
        row, column = rows.index(trial.layers), column_of[trial.learning_rate]
        found = _at(trial, step)
        tried[row][column] += 1
        counts[row][column] += found is not None
        values[row][column] = _better(values[row][column], found, higher_is_better)
    found = tuple(tuple(row) for row in values)
    evaluated, begun = (tuple(tuple(row) for row in part) for part in (counts, tried))
    return RateMatrix(tune, step, rows, columns, ranges, found, evaluated, begun)


def _at(trial: TrialRecord, step: int) -> float | None:
    """Return the trial's metric at this step; NaN if it failed before."""
    metric = next((rung.metric for rung in trial.rungs if rung.step == step), None)
    # Failed before this step: shown as failed rather than as not tried.
    return math.nan if metric is None and trial.state == "failed" else metric


def _better(held: float | None, new: float | None, higher_is_better: bool) -> float | None:
    if new is None or (held is not None and math.isnan(new)):
        return held
    if held is None or math.isnan(held):
        return new
    return max(held, new) if higher_is_better else min(held, new)


def _columns(rates: list[float]) -> tuple[tuple[str, ...], tuple[str, ...], dict[float, int]]:
    """Return column names, ranges and the column of each rate: the rates themselves if few, else equal steps of the logarithm."""
    distinct = sorted(set(rates))
    if len(distinct) <= MAX_COLUMNS:
        names = tuple(f"{rate:.1e}" for rate in distinct)
        return names, names, {rate: index for index, rate in enumerate(distinct)}
    low, high = math.log10(distinct[0]), math.log10(distinct[-1])
    step = (high - low) / MAX_COLUMNS
    edges = [10 ** (low + index * step) for index in range(MAX_COLUMNS + 1)]
    names = tuple(f"{math.sqrt(left * right):.1e}" for left, right in pairwise(edges))
    ranges = tuple(f"{left:.1e} to {right:.1e}" for left, right in pairwise(edges))
    # The highest rate lies on the upper edge of the last column.
    return names, ranges, {rate: min(int((math.log10(rate) - low) / step), MAX_COLUMNS - 1) for rate in distinct}
