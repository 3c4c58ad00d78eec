"""What is trained once the winner is known has the budget that the bundle has, wherever the scheduler had stopped the winner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.plan import make_trial
from orchestrator.report.terminal import LogView
from orchestrator.run.ledger import Ledger, TrialEntry
from orchestrator.run.records import JudgedTrial, judge_trial, judge_trials
from orchestrator.runtime import follow_up_trials as follow_up_module
from orchestrator.runtime.assignments import Answer
from orchestrator.runtime.prepare import Prepared
from orchestrator.work.results import RungResult


def stopped_early(prepared: Prepared) -> JudgedTrial:
    winner = make_trial(prepared.plan, prepared.plan.search.options[0], 1e-3, 0, seed=7)
    ledger = Ledger(prepared.run.trials)
    ledger.register(winner, 0)
    ledger.add(RungResult(trial_id=winner.trial_id, rung=0, step=1, tokens=300, state="done"))
    ledger.end(winner.trial_id, "stopped", "no promise")
    return judge_trials(ledger, prepared.scoring)[winner.trial_id]


def test_a_winner_from_other_seeds_is_itself_but_for_the_seed(submit: Callable[..., Prepared]) -> None:
    prepared = submit(search={"repeats": 3, "controls": ["shuffled", "scratch"], "scheduler": "none"})
    winner = stopped_early(prepared)
    shuffled, scratch, second, third = (each.trial for each in follow_up_module.follow_up_trials(prepared, winner))
    name = winner.trial.trial_id
    ids = [trial.trial_id for trial in (shuffled, scratch, second, third)]
    assert ids == [f"{kind}-{name}" for kind in ("shuffled", "scratch", "repeat-2", "repeat-3")]
    assert [trial.seed for trial in (winner.trial, shuffled, second, third)] == [7, 7, 8, 9]
    own = {"trial_id", "number", "control", "seed"}
    assert all(trial.model_dump(exclude=own) == winner.trial.model_dump(exclude=own) for trial in (shuffled, second, third))
    search = prepared.plan.search.model_copy(update={"repeats": 1, "controls": ()})
    without = replace(prepared, plan=prepared.plan.model_copy(update={"search": search}))
    assert follow_up_module.follow_up_trials(without, winner) == []


def test_all_are_handed_in_before_any_is_waited_for_and_one_held_back_is_told(
    submit: Callable[..., Prepared], shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = submit(search={"repeats": 3, "controls": ["shuffled"], "scheduler": "none"})
    winner = stopped_early(prepared)
    happened: list[tuple[str, str, tuple[int, ...]]] = []

    def record(_exchange: Any, trial: Any, _selection: Any, stops: tuple[int, ...]) -> None:
        happened.append(("handed in", trial.trial_id, stops))

    def wait_for(_exchange: Any, trial_id: str, _call: Any) -> Answer:
        happened.append(("waited for", trial_id, ()))
        held_back = trial_id.startswith("repeat-3")
        return Answer(score=0.0, step=9, ended=True, state="stopped" if held_back else "done", reason="no hours left")

    monkeypatch.setattr(follow_up_module, "submit", record)
    monkeypatch.setattr(follow_up_module, "wait_for", wait_for)
    follow_ups = follow_up_module.follow_up_trials(prepared, winner)
    follow_up_module.train_follow_ups(prepared, None, follow_ups, LogView(shown))
    assert [what for what, _, _ in happened] == ["handed in"] * 3 + ["waited for"] * 3
    assert winner.entry.results[-1].step < winner.trial.total_steps
    assert [stops for what, _, stops in happened if what == "handed in"] == [
        (1, winner.trial.total_steps),
        *[(winner.trial.total_steps,)] * 2,
    ]
    assert f"control_left_out: repeat-3-{winner.trial.trial_id}: no hours left" in shown.getvalue()
    assert "repeat-2" not in shown.getvalue().split("control_left_out")[1]


def test_with_early_stopping_other_seeds_end_by_themselves_and_controls_with_the_winner(submit: Callable[..., Prepared]) -> None:
    prepared = submit(search={"repeats": 2, "controls": ["shuffled"]})
    search = prepared.plan.search.model_copy(update={"rung_steps": (4, 8, 12, 16), "patience": 2})
    prepared = replace(prepared, plan=prepared.plan.model_copy(update={"search": search, "total_steps": 20}))
    winner = make_trial(prepared.plan, search.options[0], 1e-3, 0, seed=0)
    losses = {0: 2.0, 1: 1.0, 2: 1.1, 3: 1.2}
    results = [
        RungResult(trial_id=winner.trial_id, rung=rung, step=4 * rung + 4, tokens=1, state="done", eval_loss=loss)
        for rung, loss in losses.items()
    ]

    def judged(results: list[RungResult]) -> JudgedTrial:
        entry = TrialEntry(trial=winner, option=0, results=tuple(results))
        return judge_trial(entry, prepared.scoring, None, prepared.run.ledger)

    stalled = judged(results)
    assert [each.stops for each in follow_up_module.follow_up_trials(prepared, stalled)] == [(8,), (4, 8, 12, 16, 20)]
    with_curve = prepared.plan.model_copy(update={"search": search.model_copy(update={"curve_shares": (0.5,)})})
    shared = follow_up_module.follow_up_trials(replace(prepared, plan=with_curve), stalled)[-1]
    own = shared.trial.total_steps
    assert shared.trial.share == 0.5, "the winner stalled: what it has of all documents is its best rung"
    assert shared.stops == tuple(sorted({*(-(-step * own // 20) for step in (4, 8, 12, 16)), own}))
    better = judged(results[:2])
    assert [each.stops for each in follow_up_module.follow_up_trials(prepared, better)] == [(8, 20), (4, 8, 12, 16, 20)]
