"""Layers by learning rate: the search's two questions as one small matrix each for lora and full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.transfer.records import TrialRecord

MAX_COLUMNS = 7


@dataclass(frozen=True)
class RateMatrix:
    """Best metric per cell; None where nothing was tried, NaN where every trial failed."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    """Learning rates, or the middle of each of seven equal steps of its logarithm."""
    ranges: tuple[str, ...]
    """What each column spans."""
    values: tuple[tuple[float | None, ...], ...]
    counts: tuple[tuple[int, ...], ...]


def rate_matrices(trials: Sequence[TrialRecord], higher_is_better: bool, order: Sequence[str] = ()) -> list[RateMatrix]:
    """One matrix for each way of tuning that was searched, all with the same rows.

    Args:
        order: Layer policies in the order of the spec; others follow in the order of their trials.
    """
    tried = [trial.layers for trial in trials if trial.control is None]
    rows = tuple(dict.fromkeys([*(layers for layers in order if layers in tried), *tried]))
    return [
        _matrix(tune, rows, chosen, higher_is_better)
        for tune in ("lora", "full")
        if (chosen := [trial for trial in trials if trial.tune == tune and trial.control is None])
    ]


def _matrix(tune: str, rows: tuple[str, ...], trials: list[TrialRecord], higher_is_better: bool) -> RateMatrix:
    columns, ranges, column_of = _columns([trial.learning_rate for trial in trials])
    values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    counts = [[0] * len(columns) for _ in rows]
    for trial in trials:
        row, column = rows.index(trial.layers), column_of[trial.learning_rate]
        counts[row][column] += 1
        values[row][column] = _better(values[row][column], trial, higher_is_better)
    return RateMatrix(tune, rows, columns, ranges, tuple(map(tuple, values)), tuple(map(tuple, counts)))


def _better(held: float | None, trial: TrialRecord, higher_is_better: bool) -> float | None:
    new = trial.metric if trial.metric is not None else math.nan if trial.state == "failed" else None
    if new is None or (held is not None and math.isnan(new)):
        return held
    if held is None or math.isnan(held):
        return new
    return max(held, new) if higher_is_better else min(held, new)


def _columns(rates: list[float]) -> tuple[tuple[str, ...], tuple[str, ...], dict[float, int]]:
    """Column names, spans and the column of each rate: the rates themselves where few, else equal steps of the logarithm."""
    distinct = sorted(set(rates))
    if len(distinct) <= MAX_COLUMNS:
        names = tuple(f"{rate:.1e}" for rate in distinct)
        return names, names, {rate: index for index, rate in enumerate(distinct)}
    low, high = math.log10(distinct[0]), math.log10(distinct[-1])
    step = (high - low) / MAX_COLUMNS
    edges = [10 ** (low + index * step) for index in range(MAX_COLUMNS + 1)]
    names = tuple(f"{math.sqrt(left * right):.1e}" for left, right in pairwise(edges))
    ranges = tuple(f"{left:.1e} to {right:.1e}" for left, right in pairwise(edges))
    return names, ranges, {rate: min(int((math.log10(rate) - low) / step), MAX_COLUMNS - 1) for rate in distinct}
