"""What the ledger says is what its files say, to whoever opens them next."""

from __future__ import annotations

from pathlib import Path

from orchestrator.run.ledger import Ledger
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec


def trial(number: int, trial_id: str = "", **fields: object) -> TrialSpec:
    values = {"layers": "last:1", "tune": "full", "learning_rate": 1e-3, "total_steps": 9, "total_tokens": 900, "seed": 0}
    return TrialSpec.model_validate({"trial_id": trial_id or f"t{number:03d}", "number": number, **values, **fields})


def result(trial_id: str, rung: int, **fields: object) -> RungResult:
    values = {"step": 3 * (rung + 1), "tokens": 300, "state": "done", "eval_loss": 1.5 - rung}
    return RungResult.model_validate({"trial_id": trial_id, "rung": rung, **values, **fields})


def test_another_reader_finds_the_same(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.register(trial(0), 2)
    ledger.add(result("t000", 0))
    ledger.add(result("t000", 1))
    ledger.end("t000", "stopped", "no promise")
    ledger.register(trial(1), 0)
    assert Ledger(tmp_path).entries() == ledger.entries()
    assert [entry.end is None for entry in Ledger(tmp_path).entries()] == [False, True]


def test_results_stand_in_the_order_of_rungs_and_a_rung_has_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.register(trial(0), 0)
    for rung, loss in ((1, 0.5), (0, 1.5), (1, 0.4)):
        ledger.add(result("t000", rung, eval_loss=loss))
    for reader in (ledger, Ledger(tmp_path)):
        (entry,) = reader.entries()
        assert [(known.rung, known.eval_loss) for known in entry.results] == [(0, 1.5), (1, 0.4)]


def test_a_trial_that_stands_is_not_written_anew(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    first.register(trial(0), 1)
    first.add(result("t000", 0))
    written = (tmp_path / "t000" / "trial.json").stat().st_mtime_ns
    entry = Ledger(tmp_path).register(trial(0, learning_rate=9.0), 3)
    assert entry.trial.learning_rate == 1e-3
    assert entry.option == 1
    assert len(entry.results) == 1
    assert (tmp_path / "t000" / "trial.json").stat().st_mtime_ns == written


def test_the_first_end_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.register(trial(0), 0)
    ledger.end("t000", "failed", "the loss became nan")
    ledger.end("t000", "finished")
    for reader in (ledger, Ledger(tmp_path)):
        entry = reader.get("t000")
        assert entry is not None
        assert entry.end is not None
        assert (entry.end.state, entry.end.reason) == ("failed", "the loss became nan")


def test_controls_come_first(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number, name in ((1, "t001"), (-2, "head"), (0, "t000"), (-3, "none")):
        ledger.register(trial(number, name), None if number < 0 else 0)
    assert [entry.trial.trial_id for entry in ledger.entries()] == ["none", "head", "t000", "t001"]
    assert Ledger(tmp_path / "empty").entries() == []
