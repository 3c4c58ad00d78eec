"""The control on shuffled answers has the budget that the bundle has, wherever the scheduler had stopped the winner."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.plan.results import RungResult
from orchestrator.plan.values import TrialSpec
from orchestrator.runtime import sweep
from orchestrator.runtime.assignments import Answer
from orchestrator.runtime.ledger import Ledger


def test_a_winner_stopped_early_has_a_control_of_the_full_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    winner = TrialSpec(
        trial_id="t000", number=0, layers="last:1", tune="full", learning_rate=1e-3, total_steps=9, total_tokens=900, seed=0
    )
    ledger.register(winner, 0)
    ledger.add(RungResult(trial_id="t000", rung=0, step=3, tokens=300, state="done"))
    ledger.end("t000", "stopped", "no promise")
    asked: list[tuple[str, int]] = []

    def advance(_exchange: Any, control: Any, _selection: Any, *, stop_step: int) -> None:
        asked.append((control.control, stop_step))

    monkeypatch.setattr(sweep, "_advance", advance)
    monkeypatch.setattr(sweep, "_wait", lambda *_: Answer(score=0.0, step=9, ended=True, state="done"))
    monkeypatch.setattr(sweep, "selection_of", lambda *_: None)
    sweep._run_shuffled(SimpleNamespace(run=SimpleNamespace(trials=tmp_path)), None, "t000", None)  # type: ignore[arg-type]
    assert ledger.get("t000").results[-1].step < winner.total_steps  # type: ignore[union-attr]
    assert asked == [("shuffled", winner.total_steps)]
