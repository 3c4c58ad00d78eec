"""What the record of a search says of its trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from orchestrator.plan import shuffled_control
from orchestrator.run.ledger import Ledger
from orchestrator.run.records import judge_trials
from orchestrator.runtime.outcome import summarise
from orchestrator.runtime.prepare import Prepared
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

TRIAL = TrialSpec(
    trial_id="t000", number=0, layers="last:1", tune="full", learning_rate=1e-3, total_steps=9, total_tokens=900, seed=0
)


def add(
    ledger: Ledger, trial: TrialSpec, eval_loss: float, retain_loss: float, end: Literal["finished", "failed"] = "finished"
) -> None:
    """A trial that was measured at one rung and then ended."""
    ledger.register(trial, None if trial.control else 0)
    ledger.add(
        RungResult(
            trial_id=trial.trial_id, rung=0, step=3, tokens=300, state="done", eval_loss=eval_loss, retain_loss=retain_loss
        )
    )
    ledger.end(trial.trial_id, end)


def test_the_front_is_of_what_could_be_promoted(submit: Callable[..., Prepared]) -> None:
    """The control `head` may be on it; the base, other controls and what failed are not, nor what `head` beats in both."""
    prepared = submit(search={"controls": ["shuffled"]})
    ledger = Ledger(prepared.run.trials)
    add(ledger, TRIAL.model_copy(update={"trial_id": "none", "number": -3, "control": "none"}), 1.0, 4.0)
    add(ledger, TRIAL.model_copy(update={"trial_id": "head", "number": -2, "control": "head"}), 2.0, 4.01)
    add(ledger, TRIAL, 1.5, 4.05)
    add(ledger, shuffled_control(TRIAL), 1.2, 4.0)
    add(ledger, TRIAL.model_copy(update={"trial_id": "beaten", "number": 1}), 2.5, 4.02)
    add(ledger, TRIAL.model_copy(update={"trial_id": "broken", "number": 2}), 1.1, 4.0, end="failed")
    assert summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0).front == ("t000", "head")
