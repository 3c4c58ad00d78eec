"""Promoting by hand, as whoever watches sees it."""

from __future__ import annotations

import io

import pytest

from orchestrator.report.terminal import LogView
from orchestrator.runtime.merging import _shown
from orchestrator.transfer.records import Control, RungRecord, SweepResult, TrialRecord


def trial(trial_id: str, loss: float, control: Control | None = None) -> TrialRecord:
    rung = RungRecord(step=9, tokens=900, metric=loss, score=loss)
    return TrialRecord(
        trial_id=trial_id,
        number=0,
        control=control,
        layers="last:1",
        tune="full",
        learning_rate=1e-3,
        state="finished",
        rungs=(rung,),
    )


def test_the_view_is_started_on_the_chosen_trial_and_closed_whatever_happens() -> None:
    trials = (trial("none", 3.0, "none"), trial("t000", 1.5), trial("t001", 2.0))
    sweep = SweepResult(
        name="run",
        metric="loss",
        higher_is_better=False,
        max_forgetting=0.1,
        trials=trials,
        winner_id="t000",
        promotion_reason="",
    )
    said = io.StringIO()
    with pytest.raises(RuntimeError), _shown(LogView(said), sweep, "t001"):
        raise RuntimeError
    first, *_, last = said.getvalue().splitlines()
    assert first == "run: 1 trial, compared by loss"
    assert last.endswith("1 of 1 trial: 1 finished")
    assert "loss 1.500" not in said.getvalue()
