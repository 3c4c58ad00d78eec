"""What Tune is told to try: the record first, then proposals that no timing decides."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from orchestrator.plan.schedule import asha_time, surviving_share
from orchestrator.plan.values import RunPlan
from orchestrator.run.ledger import TrialEntry
from orchestrator.runtime.search import RecordedSearch, _scheduler
from orchestrator.work.trial import TrialSpec

SEED = 7


def score_of(trial: TrialSpec) -> float:
    return trial.learning_rate + len(trial.layers)


class Tuner:
    """Keeps `concurrent` trials open, as Tune does, and ends open trials in an order of its own."""

    def __init__(self, plan: RunPlan, recorded: list[TrialEntry], order: int) -> None:
        self.search = RecordedSearch(plan, SEED, recorded, in_batches=True)
        self.num_trials = plan.search.num_trials
        self.concurrent = plan.search.concurrent_trials
        self.random = random.Random(order)
        self.tried: list[tuple[TrialSpec, int]] = []
        self.open: dict[str, TrialSpec] = {}

    def run(self) -> list[TrialEntry]:
        while len(self.tried) < self.num_trials or self.open:
            while len(self.open) < self.concurrent and len(self.tried) < self.num_trials and self.start():
                if self.random.random() < 0.3:
                    self.end()
            self.end()
        return [TrialEntry(trial=trial, option=option) for trial, option in self.tried]

    def start(self) -> bool:
        name = f"tune-{len(self.tried)}"
        config = self.search.suggest(name)
        if config is None:
            return False
        self.open[name] = TrialSpec.model_validate(config["trial"])
        self.tried.append((self.open[name], config["option"]))
        return True

    def end(self) -> None:
        if self.open:
            name = self.random.choice(sorted(self.open))
            self.search.on_trial_complete(name, {"score": score_of(self.open.pop(name))})


@pytest.fixture(scope="module")
def whole(plan: RunPlan) -> list[TrialEntry]:
    return Tuner(plan, [], order=0).run()


@pytest.mark.parametrize("order", range(1, 5))
def test_who_ends_first_decides_nothing(plan: RunPlan, whole: list[TrialEntry], order: int) -> None:
    assert Tuner(plan, [], order).run() == whole


@pytest.mark.parametrize("known", [1, 3, 5, 7])
def test_an_interrupted_search_goes_on_with_the_same_trials(plan: RunPlan, whole: list[TrialEntry], known: int) -> None:
    assert Tuner(plan, whole[:known], order=known).run() == whole


def test_what_stands_in_the_record_is_tried_again_as_it_stands(plan: RunPlan, whole: list[TrialEntry]) -> None:
    """Even if it would be drawn otherwise today."""
    drawn = whole[1].trial
    kept = TrialEntry(trial=drawn.model_copy(update={"trial_id": "t001-other", "learning_rate": 3e-4}), option=whole[1].option)
    assert Tuner(plan, [kept], order=0).run()[1] == kept


def test_more_trials_leave_the_earlier_ones_alone(plan: RunPlan, whole: list[TrialEntry]) -> None:
    more = plan.model_copy(update={"search": plan.search.model_copy(update={"num_trials": plan.search.num_trials + 3})})
    extended = Tuner(more, whole, order=0).run()
    assert extended[: len(whole)] == whole
    assert len({entry.trial.trial_id for entry in extended}) == len(whole) + 3


def test_a_proposal_keeps_away_from_those_that_still_run(plan: RunPlan) -> None:
    """With ASHA: whatever is open when it is made counts, in the order of numbers."""
    search = RecordedSearch(plan, SEED, [], in_batches=False)
    for name in "abc":
        search.suggest(name)
    search.on_trial_complete("a", {"score": 1.0})
    assert [proposal.learning_rate for proposal in search._pending_at(3)] == [
        search._open[name][1].learning_rate for name in "bc"
    ]


@pytest.mark.parametrize(
    ("changed", "compared"),
    [({}, [0, 1]), ({"patience": 2, "rung_steps": (5, 9, 13, 18, 22, 26, 30, 36)}, [0, 2]), ({"rung_steps": (36,)}, [])],
    ids=["rungs by threes", "even rungs", "one rung"],
)
def test_asha_stops_trials_where_the_plan_counts_on_it(plan: RunPlan, changed: dict[str, Any], compared: list[int]) -> None:
    """Ray's scheduler, on the plan's clock: of two trials that report at every rung the worse one would be stopped at these."""
    search = plan.search.model_copy(update=changed)
    rungs = range(len(search.rung_steps) - 1)
    assert [rung for rung in rungs if surviving_share(search, rung + 1) < surviving_share(search, rung)] == compared
    scheduler = _scheduler(search, asha_time(search, len(search.rung_steps) - 1))
    stopped_at: list[int] = []
    if compared:
        scheduler.set_search_properties("score", "min")
    trials = {name: SimpleNamespace(trial_id=name) for name in ("good", "bad")}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    for rung in rungs:
        answers = [
            scheduler.on_trial_result(None, trials[name], {"score": score, "pace": asha_time(search, rung)})  # type: ignore[arg-type]
            for name, score in (("good", 1.0), ("bad", 2.0))
        ]
        stopped_at += [rung] * (answers == [TrialScheduler.CONTINUE, TrialScheduler.STOP])
    assert stopped_at == compared
