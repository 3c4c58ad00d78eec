"""Promoting by hand, as whoever watches sees it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.report.sections import recommendation
from orchestrator.report.terminal import LogView
from orchestrator.run.ledger import Ledger
from orchestrator.runtime.merging import _show, choose, promoted_by_hand
from orchestrator.runtime.run_progress import ProgressReporter
from orchestrator.transfer.learning_curve import LearningCurve, PowerLaw
from orchestrator.transfer.records import Control, RungRecord, SweepResult, TrialRecord
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec


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


TRIALS = (trial("none", 3.0, "none"), trial("t000", 1.5), trial("t001", 2.0), trial("t002", 2.5))
SWEEP = SweepResult(
    name="run",
    metric="loss",
    higher_is_better=False,
    max_forgetting=0.1,
    trials=TRIALS,
    winner_id="t000",
    promotion_reason="last:1 · full · lr 1.0e-03: loss 1.5 against the base's 3",
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """t000 and t001 can be merged; t002 has failed after its first rung, t003 has no weights, `shuffled-t000` is a control."""
    found = Ledger(tmp_path)
    trials: list[tuple[str, Any]] = [("head", "head"), ("shuffled-t000", "shuffled"), *((f"t00{n}", None) for n in range(4))]
    for number, (trial_id, control) in enumerate(trials):
        spec = TrialSpec(
            trial_id=trial_id,
            number=number,
            control=control,
            layers="last:1",
            tune="full",
            learning_rate=1e-3,
            total_steps=9,
            total_tokens=900,
            seed=0,
        )
        found.register(spec, None if control else 0)
        checkpoint = None if trial_id == "t003" else str(tmp_path / trial_id / "rung-0")
        found.add(RungResult(trial_id=trial_id, rung=0, step=3, tokens=300, state="done", checkpoint=checkpoint))
        found.end(trial_id, "failed" if trial_id == "t002" else "finished", "the loss became nan" if trial_id == "t002" else "")
    return found


def test_the_promoted_trial_is_merged_again_and_another_one_is_promoted_by_hand(ledger: Ledger) -> None:
    assert choose(SWEEP, ledger, None, promote=False) == choose(SWEEP, ledger, "t000", promote=False) == "t000"
    assert choose(SWEEP, ledger, "t001", promote=True) == "t001"
    assert choose(SWEEP, ledger, "head", promote=True) == "head", "feature extraction may be enough"
    nothing = SWEEP.model_copy(update={"winner_id": None})
    assert choose(nothing, ledger, "t001", promote=True) == "t001"


@pytest.mark.parametrize(
    ("trial_id", "promote", "winner", "said"),
    [
        ("t001", False, "t000", "t001 is not promoted: t000 is"),
        ("t001", False, None, "t001 is not promoted: nothing is"),
        (None, False, None, "nothing was promoted"),
        (None, True, "t000", "--promote names no trial"),
        ("t009", True, "t000", "no trial 't009'"),
        ("t002", True, "t000", "trial t002 failed: the loss became nan"),
        ("t003", True, "t000", "trial t003 has no weights"),
        ("shuffled-t000", True, "t000", "is the control shuffled"),
    ],
)
def test_what_cannot_be_promoted_is_refused(
    ledger: Ledger, trial_id: str | None, promote: bool, winner: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        choose(SWEEP.model_copy(update={"winner_id": winner}), ledger, trial_id, promote=promote)
    assert "--promote" in str(refused.value) or "t000, t001" in str(refused.value), "what would go is said"


def test_the_learning_curve_is_of_the_trial_that_it_was_measured_of() -> None:
    law = PowerLaw(floor=1.5, scale=8.0, power=0.5)
    found = LearningCurve(
        trial_id="t000", counts=(1, 2, 4, 8), losses=(4, 3, 2, 1), law=law, ahead_count=16, ahead_loss=0.9, low=0.8, high=1.0
    )
    sweep = SWEEP.model_copy(update={"learning_curve": found})
    assert promoted_by_hand(sweep, "t000").curve_of_winner == found
    other = promoted_by_hand(sweep, "t001")
    assert other.curve_of_winner is None
    assert other.no_learning_curve == "it was measured for t000, before another was promoted by hand"
    assert promoted_by_hand(other, "t002").no_learning_curve == other.no_learning_curve
    back = promoted_by_hand(other, "t000")
    assert (back.curve_of_winner, back.no_learning_curve) == (found, "")
    nothing = SWEEP.model_copy(update={"winner_id": None, "no_learning_curve": "no promoted trial to train on less data"})
    assert promoted_by_hand(nothing, "t001").no_learning_curve == "it is measured only for a trial promoted by the rule"


def test_a_trial_that_the_record_does_not_know_yet_is_refused() -> None:
    with pytest.raises(UsageError, match="t007 was added after the search results were last written"):
        promoted_by_hand(SWEEP, "t007")


def test_what_the_rule_had_said_stays_however_often_a_person_decides() -> None:
    once = promoted_by_hand(SWEEP, "t001")
    assert once.no_learning_curve == "", "none was asked for"
    assert (once.winner_id, once.promoted_by_hand) == ("t001", True)
    said = "promoted by hand: last:1 · full · lr 1.0e-03; by the rule: last:1 · full · lr 1.0e-03: loss 1.5 against the base's 3"
    assert once.promotion_reason == promoted_by_hand(once, "t001").promotion_reason == said
    assert recommendation(once) == f"P{said[1:]}."
    assert recommendation(SWEEP) == f"Promoted: {SWEEP.promotion_reason}."
    nothing = SWEEP.model_copy(update={"winner_id": None, "promotion_reason": "no trial was evaluated"})
    assert recommendation(nothing) == "Nothing was promoted: no trial was evaluated."


def test_the_rule_stays_also_in_a_record_of_an_older_version() -> None:
    once = promoted_by_hand(SWEEP, "t001")
    record = once.model_dump(mode="json")
    assert record.pop("rule_reason") == SWEEP.promotion_reason
    assert SweepResult.model_validate(record) == once
    assert SweepResult.model_validate(SWEEP.model_dump(mode="json", exclude={"rule_reason"})) == SWEEP


def test_the_view_is_started_on_the_chosen_trial_and_closed_whatever_happens() -> None:
    said = io.StringIO()

    def bundle() -> None:
        with ProgressReporter(LogView(said), None) as reporter:
            _show(reporter, SWEEP, "t001")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        bundle()
    first, *_, last = said.getvalue().splitlines()
    assert first == "run: 1 trial, compared by loss"
    assert last.endswith("1 of 1 trial: 1 finished")
    assert "loss 1.500" not in said.getvalue()
