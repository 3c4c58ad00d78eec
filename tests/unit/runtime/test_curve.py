"""The promoted trial's learning curve: which trials it takes, what comes of them, and why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data import TokenizedSet, documents_of_share
from orchestrator.plan import curve_trial_id
from orchestrator.plan.schedule import SHARES, total_steps
from orchestrator.run.hours import HoursState
from orchestrator.run.ledger import Ledger
from orchestrator.run.records import JudgedTrial, judge_trials
from orchestrator.runtime.follow_up_trials import curve_trials
from orchestrator.runtime.outcome import summarise
from orchestrator.runtime.prepare import Prepared
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

NUM_EVAL = 30
TRIAL = TrialSpec(
    trial_id="t000", number=0, layers="last:1", tune="lora", learning_rate=1e-3, total_steps=9, total_tokens=900, seed=0
)
NONE = TRIAL.model_copy(update={"trial_id": "none", "number": -5, "control": "none"})


@pytest.fixture
def prepared(submit: Callable[..., Prepared]) -> Prepared:
    return submit(search={"learning_curve": True})


def add(ledger: Ledger, trial: TrialSpec, loss: float, *, step: int | None = None, **fields: Any) -> None:
    """A trial that ended there, with a loss of every eval document around `loss`."""
    checkpoint = ledger.folder(trial.trial_id) / "rung-0"
    checkpoint.mkdir(parents=True)
    tokens = np.arange(1, NUM_EVAL + 1)
    np.savez(checkpoint / "eval.npz", loss_sums=tokens * (loss + np.linspace(-0.2, 0.2, NUM_EVAL)), num_tokens=tokens)
    ledger.register(trial, None if trial.control else 0)
    values = {"rung": 0, "step": trial.total_steps if step is None else step, "tokens": 300, "state": "done", "eval_loss": loss}
    found = {"trial_id": trial.trial_id, "checkpoint": str(checkpoint), **values, **fields}
    ledger.add(RungResult.model_validate(found))
    ledger.end(trial.trial_id, "finished" if found["state"] == "done" else "failed")


def add_rungs(ledger: Ledger, trial: TrialSpec, losses: Sequence[float], *, end: bool = True) -> None:
    """A trial that was scored after every step, with these losses."""
    ledger.register(trial, None if trial.control else 0)
    tokens = np.arange(1, NUM_EVAL + 1)
    for rung, loss in enumerate(losses):
        checkpoint = ledger.folder(trial.trial_id) / f"rung-{rung}"
        checkpoint.mkdir(parents=True)
        np.savez(checkpoint / "eval.npz", loss_sums=tokens * (loss + np.linspace(-0.2, 0.2, NUM_EVAL)), num_tokens=tokens)
        fields = {"rung": rung, "step": rung + 1, "tokens": 300, "state": "done", "eval_loss": loss, "eval_seconds": 1.0}
        ledger.add(RungResult.model_validate({"trial_id": trial.trial_id, "checkpoint": str(checkpoint), **fields}))
    if end:
        ledger.end(trial.trial_id, "stopped", "it stalled")


def searched(prepared: Prepared, *, step: int = 9) -> tuple[Ledger, JudgedTrial]:
    """A search that is over: the base, and the trial that wins."""
    ledger = Ledger(prepared.run.trials)
    add(ledger, NONE, 5.0, step=0)
    add(ledger, TRIAL, 2.0, step=step)
    winner = judge_trials(ledger, prepared.scoring)["t000"]
    return ledger, winner


def trained(prepared: Prepared, ledger: Ledger, winner: JudgedTrial, losses: Sequence[float]) -> None:
    for trial, loss in zip(curve_trials(prepared, winner), losses, strict=True):
        add(ledger, trial, loss)


def test_the_winner_is_trained_on_shares_for_as_many_epochs(prepared: Prepared) -> None:
    _, winner = searched(prepared)
    train = TokenizedSet.load(Path(prepared.data_paths.train))
    trials = curve_trials(prepared, winner)
    assert [trial.share for trial in trials] == [*SHARES]
    for trial in trials:
        part = train.select(documents_of_share(train, trial.share, TRIAL.seed))
        assert trial.total_tokens == prepared.spec.train.epochs * part.num_tokens
        assert trial.learning_rate == TRIAL.learning_rate
    steps = total_steps(prepared.spec, prepared.plan.data.model_copy(update={"steps_per_epoch": 1}))
    assert trials[0].total_steps == steps, "so few documents are one step an epoch"
    assert curve_trials(prepared, winner) == trials, "another submission asks for the same ones"


def test_a_winner_that_was_stopped_early_is_trained_on_all_documents_too(prepared: Prepared) -> None:
    ledger, winner = searched(prepared, step=3)
    trials = curve_trials(prepared, winner)
    assert [trial.share for trial in trials] == [*SHARES, 1.0]
    assert (trials[-1].total_steps, trials[-1].total_tokens) == (prepared.plan.total_steps, prepared.plan.total_tokens)
    trained(prepared, ledger, winner, [3.3, 3.0, 2.6, 2.3, 1.9])
    found = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0).learning_curve
    assert found is not None
    assert found.losses[-1] == pytest.approx(1.9, abs=0.1), "of the whole training, and not of the rung that was stopped"


def test_a_trial_that_stalled_is_judged_by_its_best_rung(prepared: Prepared) -> None:
    assert prepared.scoring.patience == 2
    ledger = Ledger(prepared.run.trials)
    add(ledger, NONE, 5.0, step=0)
    add_rungs(ledger, TRIAL, [3.0, 2.0, 2.5, 2.9])
    winner = judge_trials(ledger, prepared.scoring)["t000"]
    *trials, last = curve_trials(prepared, winner)
    assert [trial.share for trial in (*trials, last)] == [*SHARES], "more steps did the winner no good: all documents are done"
    for trial, loss in zip(trials, (4.0, 3.2, 2.7), strict=True):
        add_rungs(ledger, trial, [loss + 0.5, loss, loss + 1, loss + 2])
    add_rungs(ledger, last, [2.8, 2.3], end=False)
    told = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    assert told.learning_curve is None
    documents = round(prepared.plan.data.train_documents / 2)
    assert told.no_learning_curve == f"the trial on {documents} documents reached only step 2 of {last.total_steps}"
    ledger.end(last.trial_id, "finished")
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    assert sweep.learning_curve is not None
    off = np.average(np.linspace(-0.2, 0.2, NUM_EVAL), weights=np.arange(1, NUM_EVAL + 1))
    assert sweep.learning_curve.losses == pytest.approx([loss + off for loss in (4.0, 3.2, 2.7, 2.3, 2.0)])
    assert sweep.learning_curve_seconds == 3 * 4 + 2


def test_the_curve_is_in_the_record_and_its_trials_are_not(prepared: Prepared) -> None:
    ledger, winner = searched(prepared)
    trained(prepared, ledger, winner, [4.0, 3.2, 2.7, 2.3])
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    assert [trial.trial_id for trial in sweep.trials] == ["none", "t000"]
    assert sweep.winner_id == "t000"
    assert sweep.front == ("t000",)
    found = sweep.learning_curve
    assert found is not None
    total = prepared.plan.data.train_documents
    assert found.counts == (round(total / 16), round(total / 8), round(total / 4), round(total / 2), total)
    weights, spread = np.arange(1, NUM_EVAL + 1), np.linspace(-0.2, 0.2, NUM_EVAL)
    assert found.losses == pytest.approx([loss + np.average(spread, weights=weights) for loss in (4.0, 3.2, 2.7, 2.3, 2.0)])
    assert sweep.no_learning_curve == ""
    assert (
        summarise(prepared, judge_trials(Ledger(prepared.run.trials), prepared.scoring), [], started_at=0.0).learning_curve
        == found
    ), "read again from disk"


def test_without_being_asked_for_there_is_none_and_no_word_of_it(submit: Callable[..., Prepared]) -> None:
    prepared = submit()
    ledger, winner = searched(prepared)
    assert curve_trials(prepared, winner) == []
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    assert (sweep.learning_curve, sweep.no_learning_curve) == (None, "")


def test_a_trial_that_failed_leaves_no_curve_and_says_why(prepared: Prepared) -> None:
    ledger, winner = searched(prepared)
    first, second, *others = curve_trials(prepared, winner)
    add(ledger, first, 3.0)
    add(ledger, second, 2.6, state="failed", reason="the training loss became nan")
    for trial in others:
        add(ledger, trial, 2.3)
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    assert sweep.learning_curve is None
    documents = round(prepared.plan.data.train_documents / 8)
    assert sweep.no_learning_curve == f"the trial on {documents} documents failed: the training loss became nan"
    assert sweep.winner_id == "t000", "the run goes on"


def test_a_curve_that_waits_for_hours_is_told(prepared: Prepared) -> None:
    ledger, winner = searched(prepared)
    add(ledger, TRIAL.model_copy(update={"trial_id": "t001", "number": 1}), 2.5)
    add(ledger, TRIAL.model_copy(update={"trial_id": "head", "number": -4, "control": "head"}), 3.5)
    first, *_ = curve_trials(prepared, winner)
    add(ledger, first, 3.0)
    sweep = summarise(
        prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0, hours=HoursState(used=2, spent="the bound")
    )
    assert sweep.ended_by_hours == "all 2 trials were searched, but out of GPU-hours for the learning curve: the bound"
    assert sweep.no_learning_curve.endswith("did not run")
    for trial in curve_trials(prepared, winner)[1:]:
        add(ledger, trial, 2.5)
    sweep = summarise(
        prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0, hours=HoursState(used=2, spent="the bound")
    )
    assert (sweep.ended_by_hours, sweep.learning_curve is not None) == ("", True)


def test_another_winners_curve_is_not_shown(prepared: Prepared) -> None:
    """An extended sweep may have another winner, whose curve is trained anew."""
    ledger, winner = searched(prepared)
    trained(prepared, ledger, winner, [4.0, 3.2, 2.7, 2.3])
    better = TRIAL.model_copy(update={"trial_id": "t001", "number": 1})
    add(ledger, better, 1.0)
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    assert sweep.winner_id == "t001"
    assert sweep.learning_curve is None
    assert ledger.get(curve_trial_id(0.5, "t000")) is not None
    entry = judge_trials(ledger, prepared.scoring)["t001"]
    assert [trial.trial_id for trial in curve_trials(prepared, entry)] == [f"curve-{share:g}-t001" for share in SHARES]
