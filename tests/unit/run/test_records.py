"""From results to the records that are compared and shown, and to a run's outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.run.ledger import Ledger, TrialEnd, TrialEntry
from orchestrator.run.records import RunOutcome, judge_trials, read_outcome, trial_record, write_outcome
from orchestrator.run.scoring import Scoring
from orchestrator.store import read_json
from orchestrator.transfer import WORST_SCORE
from orchestrator.transfer.records import SweepResult, TransferReport
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

TRIAL = TrialSpec(
    trial_id="t000", number=0, layers="last:1", tune="full", learning_rate=1e-3, total_steps=9, total_tokens=900, seed=0
)
SCORING = Scoring(metric="loss", max_forgetting=0.1)


def result(rung: int = 0, **fields: object) -> RungResult:
    values = {"trial_id": "t000", "rung": rung, "step": 3, "tokens": 300, "state": "done", "eval_loss": 1.5, "retain_loss": 4.0}
    return RungResult.model_validate({**values, **fields})


BASE = result(trial_id="none", eval_loss=3.0, retain_loss=3.95)


def test_forgetting_is_measured_from_the_untouched_base() -> None:
    record = trial_record(TrialEntry(trial=TRIAL, option=0, results=(result(),)), SCORING, BASE)
    assert record.forgetting == pytest.approx(0.05)
    assert record.state == "running"
    assert record.score == pytest.approx(1.5), "within the bound there is no penalty"


def test_forgetting_beyond_the_bound_costs() -> None:
    kept, lost = (SCORING.score(result(retain_loss=loss), BASE) for loss in (4.0, 4.5))
    assert lost > kept == pytest.approx(1.5)


@pytest.mark.parametrize(
    "broken",
    [{"state": "failed", "eval_loss": None}, {"eval_loss": None}, {"state": "failed"}],
    ids=["failed", "unmeasured", "late"],
)
def test_what_failed_scores_worst_and_finite(broken: dict[str, object]) -> None:
    assert SCORING.score(result(**broken), BASE) == WORST_SCORE


def test_a_metric_to_be_raised_is_turned_round() -> None:
    scoring = Scoring(metric="accuracy", max_forgetting=0.1)
    low, high = (scoring.score(result(metrics={"accuracy": value}), None) for value in (0.2, 0.9))
    assert high < low
    assert scoring.score(result(), None) == WORST_SCORE, "the loss does not stand in for another metric"


def test_a_trial_that_failed_keeps_its_reason_and_the_rungs_before() -> None:
    results = (result(0), result(1, state="failed", reason="the training loss became nan", eval_loss=None))
    record = trial_record(TrialEntry(trial=TRIAL, option=0, results=results, end=TrialEnd(state="failed")), SCORING, BASE)
    assert (record.state, record.reason) == ("failed", "the training loss became nan")
    assert [rung.rung for rung in record.rungs] == [0]


def test_the_base_of_the_ledger_is_the_control_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.register(TRIAL, 0)
    ledger.add(result())
    assert judge_trials(ledger, SCORING)[TRIAL.trial_id].record.forgetting is None
    ledger.register(TRIAL.model_copy(update={"trial_id": "none", "number": -3, "control": "none"}), None)
    ledger.add(BASE)
    assert judge_trials(ledger, SCORING)[TRIAL.trial_id].record.forgetting == pytest.approx(0.05)


def test_a_run_has_an_outcome_once_it_ended(tmp_path: Path) -> None:
    sweep = SweepResult(
        name="run",
        metric="loss",
        higher_is_better=False,
        max_forgetting=0.1,
        trials=(),
        winner_id=None,
        promotion_reason="nothing gained",
    )
    assert read_outcome(tmp_path) is None
    (tmp_path / "sweep.json").write_text(sweep.model_dump_json())
    (tmp_path / "transfer.json").write_text(TransferReport().model_dump_json())
    assert read_outcome(tmp_path) is None, "the search's own record has no end"
    written = write_outcome(RunOutcome(tmp_path, sweep, TransferReport(sentence="nothing was promoted")))
    assert written.sweep.finished_at is not None
    assert read_outcome(tmp_path) == written
    assert read_json(tmp_path / "transfer.json")["sentence"] == "nothing was promoted"
