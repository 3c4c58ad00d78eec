"""The memory table's words where memory ran out."""

from __future__ import annotations

from orchestrator.report.memory import memory_table
from orchestrator.transfer.records import EngineFigures, SweepResult, TrialRecord

ENGINE = EngineFigures(
    executor="torch", device="cuda", rank_peak_memory_bytes=(90,), predicted_memory_bytes=100, micro_batch_rows=1
)


def table(*trials: TrialRecord) -> str:
    figures = {"name": "run", "metric": "loss", "higher_is_better": False, "max_forgetting": 0.1, "winner_id": None}
    return str(memory_table(SweepResult.model_validate({**figures, "trials": trials, "promotion_reason": ""})))


def trial(name: str, engine: EngineFigures | None, state: str = "finished", *, out_of_memory: bool) -> TrialRecord:
    values = {"trial_id": name, "number": 0, "layers": "last:2", "tune": "full", "learning_rate": 1.0}
    return TrialRecord.model_validate({**values, "state": state, "engine": engine, "out_of_memory": out_of_memory})


def test_a_choice_that_ran_out_of_memory_says_how_it_went_on_and_has_no_ratio() -> None:
    reduced, failed = trial("a", ENGINE, out_of_memory=True), trial("b", None, "failed", out_of_memory=True)
    assert "0.90x" in table(trial("a", ENGINE, out_of_memory=False))
    alone = table(reduced)
    assert "out of memory; retried with 1 row<" in alone
    assert "0.90x" not in alone
    assert "out of memory; retried with 1 row (1 failed)" in table(reduced, failed)
    assert "out of memory; could not be reduced further" in table(failed)
