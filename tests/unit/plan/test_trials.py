"""Trials carry all that decides their numbers, and ids that say so."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.plan import (
    compile_trial,
    curve_trial,
    head_control,
    make_assignment,
    make_plan,
    make_trial,
    none_control,
    probe_trial,
    shift_trial,
    shuffled_control,
)
from orchestrator.plan.values import RunPlan
from orchestrator.work.execution import DataPaths, TrainSettings
from orchestrator.work.measurements import CompilePlan, ProbePlan, ShiftPlan
from orchestrator.work.remedies import Remedies

SEARCH = {"layers": ["last:1", "all"], "tune": ["lora"], "lora_rank": [4], "learning_rate": {"lora": [1e-3, 1e-1]}}


@pytest.fixture(scope="module")
def loaded(job: Any) -> Any:
    return job(search=SEARCH)


@pytest.fixture(scope="module")
def run_plan(base: Any, loaded: Any, cores: Any, data: Any) -> RunPlan:
    return make_plan(loaded, base("tiny"), data(), cores(), job="sweep", spec_sha256="0" * 64)


def options(plan: RunPlan) -> Any:
    assert plan.search is not None
    return plan.search.options


def test_a_trial_has_the_full_budget_and_an_id(run_plan: RunPlan) -> None:
    trial = make_trial(run_plan, options(run_plan)[0], 2e-3, number=7, seed=3)
    assert trial.trial_id.startswith("t007-")
    assert len(trial.trial_id) == len("t007-") + 6
    assert (trial.layers, trial.tune, trial.lora_rank, trial.learning_rate, trial.seed) == ("last:1", "lora", 4, 2e-3, 3)
    assert (trial.total_steps, trial.total_tokens) == (run_plan.total_steps, run_plan.total_tokens)


def test_the_id_follows_what_the_trial_is(run_plan: RunPlan) -> None:
    first, second = options(run_plan)
    ids = {
        make_trial(run_plan, option, rate, 0, seed).trial_id
        for option in (first, second)
        for rate in (1e-3, math.nextafter(1e-3, 1))
        for seed in (0, 1)
    }
    assert len(ids) == 8
    again = [make_trial(run_plan, first, 1e-3, number, 0).trial_id[-6:] for number in (1, 2)]
    assert again[0] == again[1], "the hash is over the trial, not over its number"


def test_the_untouched_base(run_plan: RunPlan, base: Any) -> None:
    trial, selection = none_control(run_plan, base("tiny"), seed=0)
    assert (trial.trial_id, trial.control, trial.layers, trial.learning_rate) == ("none", "none", "none", 0.0)
    assert not selection.trainable
    assert not selection.adapted
    assert selection.num_trainable_parameters == 0


def test_feature_extraction_learns_in_the_middle_of_its_range(run_plan: RunPlan, base: Any, loaded: Any) -> None:
    trial, selection = head_control(run_plan, base("tiny"), loaded.spec, seed=0)
    assert (trial.trial_id, trial.control, trial.layers, trial.tune) == ("head", "head", "head", "full")
    assert trial.learning_rate == pytest.approx(math.sqrt(1e-4 * 1e-2))
    assert selection.trainable == ("lm_head.weight",)


def test_a_new_classifier_learns_ten_times_as_fast(base: Any, job: Any, cores: Any, data: Any) -> None:
    loaded = job(task="classify", search=SEARCH)
    plan = make_plan(loaded, base("tiny"), data(num_classes=3), cores(), job="sweep", spec_sha256="0" * 64)
    trial, selection = head_control(plan, base("tiny"), loaded.spec, seed=0)
    assert trial.learning_rate == pytest.approx(math.sqrt(1e-3 * 1e-1))
    assert selection.new_classifier


def test_shuffled_answers_are_the_winner_once_more(run_plan: RunPlan) -> None:
    winner = make_trial(run_plan, options(run_plan)[1], 5e-3, number=4, seed=0)
    control = shuffled_control(winner)
    assert (control.trial_id, control.control) == (f"shuffled-{winner.trial_id}", "shuffled")
    same = ("layers", "tune", "lora_rank", "learning_rate", "seed", "total_steps", "total_tokens")
    assert all(getattr(control, name) == getattr(winner, name) for name in same)


def test_a_point_of_the_curve_is_the_winner_on_a_share_with_a_schedule_of_its_own(run_plan: RunPlan) -> None:
    winner = make_trial(run_plan, options(run_plan)[1], 5e-3, number=4, seed=0)
    winner = winner.model_copy(update={"remedies": Remedies(replay=0.2)})
    point = curve_trial(winner, 0.25, total_steps=7, target_tokens=800)
    assert (point.trial_id, point.control, point.share) == (f"curve-0.25-{winner.trial_id}", "curve", 0.25)
    assert (point.total_steps, point.total_tokens) == (7, 1000), "what is replayed comes on top"
    same = ("layers", "tune", "lora_rank", "learning_rate", "seed", "remedies")
    assert all(getattr(point, name) == getattr(winner, name) for name in same)


def test_what_a_gang_measures_is_no_trial(run_plan: RunPlan, base: Any) -> None:
    """Nothing of it may be looked for in the ledger."""
    nothing, selection = none_control(run_plan, base("tiny"), seed=0)
    given: Any = {
        "settings": TrainSettings(warmup=0.05, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=8192),
        "data": DataPaths(train="train.npz", eval="eval.npz"),
        "metric": "loss",
        "folder": "run",
        "rung": 0,
        "start": None,
        "stop_step": 0,
    }
    measured: list[tuple[Any, dict[str, Any]]] = [
        (probe_trial(run_plan, base("tiny"), seed=0)[0], {"probe": ProbePlan(num_batches=1, rows=1)}),
        (shift_trial(run_plan, base("tiny"), seed=0)[0], {"shift": ShiftPlan(cuts=(1,), num_documents=20)}),
        (compile_trial(run_plan, 0, seed=0), {"compiling": CompilePlan(option=0, reason="")}),
    ]
    for trial, what in measured:
        assert make_assignment(run_plan, trial, selection, **given, **what).measures
    assert not make_assignment(run_plan, nothing, selection, **given).measures


def test_an_assignment_takes_the_plans_execution_unless_told(run_plan: RunPlan) -> None:
    option = options(run_plan)[0]
    trial = make_trial(run_plan, option, 1e-3, 0, 0)
    given: Any = {
        "settings": TrainSettings(warmup=0.05, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=8192),
        "data": DataPaths(train="train.npz", eval="eval.npz"),
        "metric": "loss",
        "folder": "trials/x",
        "rung": 1,
        "start": "trials/x/rung-0",
        "stop_step": 30,
    }
    assignment = make_assignment(run_plan, trial, option.selection, **given)
    assert assignment.execution == run_plan.execution
    assert (assignment.rung, assignment.start, assignment.stop_step) == (1, "trials/x/rung-0", 30)
    refit = make_assignment(run_plan, trial, option.selection, **given, execution=run_plan.refit_execution)
    assert refit.execution == run_plan.refit_execution
