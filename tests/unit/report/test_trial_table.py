"""The table of trials: at which step each was evaluated, and why it stands where it stands."""

from __future__ import annotations

import math

import pytest

from orchestrator.report.html import table
from orchestrator.report.page import write_report
from orchestrator.report.trial_table import evaluated_early, rank_reason, steps_text
from orchestrator.transfer import score

from .test_page import read, scored


@pytest.fixture
def sweep(make):
    """The winner; one with a better loss that forgets too much; one that was stopped; one that failed."""
    winner = scored(make.trial(0, "last:4", "lora", 8, 1e-3), 1.8, 0.05)
    forgets = scored(make.trial(1, "all", "full", None, 1e-4), 1.2, 0.31)
    forgets = forgets.model_copy(update={"rungs": (forgets.rungs[0].model_copy(update={"score": 3.3}),)})
    stopped = make.trial(2, "last:2", "lora", 8, 4e-4, state="stopped").model_copy(update={"reason": ""})
    failed = make.trial(3, "all", "full", None, 5e-4, state="failed")
    ahead = scored(make.trial(4, "last:2", "full", None, 1e-4), 1.7, 0.0)
    trials = (make.control("none"), winner, forgets, stopped, failed, ahead)
    return make.sweep(trials=trials, winner_id=winner.trial_id)


def test_why_each_stands_where_it_stands(sweep):
    _, winner, forgets, stopped, failed, ahead = sweep.trials
    assert rank_reason(winner, sweep) == "promoted"
    assert rank_reason(forgets, sweep) == "forgets more than the bound of 0.1: ranked as loss 3.300"
    assert rank_reason(stopped, sweep) == "stopped at step 6: others were better at that step"
    assert rank_reason(failed, sweep) == "failed: the loss became NaN at step 3 (learning rate 5.0e-04)"
    assert rank_reason(ahead, sweep) == "scored better than the promoted trial, but not shown to be better than the base model"
    by_hand = sweep.model_copy(update={"promoted_by_hand": True})
    assert rank_reason(winner, by_hand) == "promoted by hand"
    assert rank_reason(ahead, by_hand) == ""
    assert rank_reason(forgets, sweep.model_copy(update={"max_forgetting": math.inf})) == "", "there is no bound"


def test_more_is_better_ranks_by_the_turned_score(sweep):
    forgets = sweep.trials[2]
    rung = forgets.rungs[0].model_copy(update={"metric": 0.9, "score": score(0.9, True, 0.15, 0.1)})
    turned = sweep.model_copy(update={"metric": "accuracy", "higher_is_better": True})
    said = rank_reason(forgets.model_copy(update={"rungs": (rung,)}), turned)
    assert said == "forgets more than the bound of 0.1: ranked as accuracy 40.0%"


def test_at_which_step_a_trial_was_evaluated(make):
    whole, stopped = make.trial(0, "all", "lora", 8, 1e-3), make.trial(2, "all", "lora", 8, 1e-3, state="stopped")
    running = make.trial(4, "all", "lora", 8, 1e-3, state="running")
    assert [steps_text(trial, 54) for trial in (whole, stopped)] == ["54 of 54", "6 of 54"]
    assert steps_text(running, 6) == "6 of 54"
    assert steps_text(running, 17) == "6 of 54, now at 17"
    assert steps_text(make.control("none"), 0) == "-"
    assert [evaluated_early(trial) for trial in (whole, stopped, make.control("none"))] == [False, True, False]


def test_the_page_has_the_reasons(fake_run, sweep):
    page = read(write_report(fake_run(sweep=sweep)))
    assert "why it ranks here" in page.text
    assert "forgets more than the bound of 0.1: ranked as loss 3.300" in page.text


def test_columns_in_which_nothing_stands_are_left_out():
    written = table(["trial", "reason", "loss"], [[1, "", 2.0], [2, "-", "-"]], numeric=(0, 2), marked=(1,))
    assert "reason" not in written
    assert '<th class="number" scope="col">loss</th>' in written
    assert '<tr class="marked"><td class="number">2</td><td class="number">-</td></tr>' in written
    assert "reason" in table(["trial", "reason"], [])
