"""Memory as planned beside as measured, choice by choice."""

from __future__ import annotations

import pytest

from orchestrator.transfer import memory_rows
from orchestrator.transfer.records import EngineFigures, TrialRecord


def trial(name: str, layers: str, peaks: tuple[int, ...], *, control: str | None = None, **figures: object) -> TrialRecord:
    engine = EngineFigures.model_validate(
        {"executor": "torch", "device": "cuda", "rank_peak_memory_bytes": peaks, "micro_batch_rows": 8, **figures}
    )
    values = {"trial_id": name, "number": 0, "layers": layers, "tune": "full", "learning_rate": 1.0, "state": "finished"}
    return TrialRecord.model_validate(values | {"control": control, "engine": engine})


def test_a_row_has_the_most_that_any_trial_used_on_each_rank() -> None:
    rows = memory_rows(
        [
            trial("none", "none", (100, 90), control="none", predicted_memory_bytes=110),
            trial("a", "last:2", (200, 300), predicted_memory_bytes=250),
            trial("b", "last:2", (210, 280), predicted_memory_bytes=250, micro_batch_rows=2),
            trial("failed", "all", ()),
        ]
    )
    assert [row.label for row in rows] == ["base model", "last:2 · full"]
    base, choice = rows
    assert base.ratio == pytest.approx(100 / 110)
    assert (choice.num_trials, choice.rank_peak_bytes, choice.measured_bytes) == (2, (210, 300), 300)
    assert choice.ratio == pytest.approx(300 / 250)
    assert choice.micro_batch_rows == 2


def test_what_the_plan_did_not_weigh_has_no_ratio() -> None:
    (row,) = memory_rows([trial("head", "head", (100,), control="head")])
    assert (row.predicted_bytes, row.ratio) == (None, None)


def test_a_row_whose_trials_ran_out_of_memory_says_so_and_has_no_ratio() -> None:
    """What fitted was not what was planned, so that it must not speak for the plan."""
    small = trial("a", "last:2", (90, 100), predicted_memory_bytes=100, micro_batch_rows=1)
    failed = trial("b", "last:3", ()).model_copy(update={"engine": None, "state": "failed", "out_of_memory": True})
    rows = memory_rows([small.model_copy(update={"out_of_memory": True}), failed])
    assert [(row.ratio, row.num_out_of_memory, row.num_failed_for_memory) for row in rows] == [(None, 1, 0), (None, 1, 1)]
    assert [row.measured_bytes for row in rows] == [100, 0]
