"""Trials carry all that decides their numbers, and ids that say so."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter

from orchestrator.plan import (
    curve_trial,
    evaluate_base,
    head_control,
    make_plan,
    make_trial,
    none_control,
    shuffled_control,
    train_rung,
    work_context,
)
from orchestrator.plan.values import RunPlan
from orchestrator.work.assignment import Measurement, MeasureShift, ScoreBlocks, TimeCompiling, Work, WorkContext
from orchestrator.work.execution import DataPaths, TrainSettings, TrunkPlan
from orchestrator.work.failure import Failure
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


def context_of(plan: RunPlan, execution: Any = None) -> WorkContext:
    settings = TrainSettings(warmup=0.05, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=8192)
    data = DataPaths(train="train.npz", eval="eval.npz")
    return work_context(plan, settings=settings, data=data, metric="loss", execution=execution)


def test_a_measurement_is_no_trial_and_is_read_back_as_what_it_is(run_plan: RunPlan) -> None:
    option = options(run_plan)[0]
    shared: Any = {"context": context_of(run_plan), "execution": run_plan.execution, "seed": 0}
    measured: list[Measurement] = [
        ScoreBlocks(**shared, plan=ProbePlan(num_batches=1, rows=1)),
        MeasureShift(**shared, plan=ShiftPlan(cuts=(1,), num_documents=20)),
        TimeCompiling(
            **shared,
            plan=CompilePlan(option=0, reason=""),
            trial=make_trial(run_plan, option, 1e-3, 0, 0),
            selection=option.selection,
        ),
    ]
    assert [work.work_id for work in measured] == ["probe", "shift", "compile"]
    for work in measured:
        assert TypeAdapter[Any](Work).validate_json(work.model_dump_json()) == work
        failed = work.failed(Failure(kind="training", message="it broke"))
        assert (failed.work_id, failed.found.failed) == (work.work_id, "it broke")


def test_only_work_that_reads_the_trunk_is_told_of_it(run_plan: RunPlan, base: Any) -> None:
    plan = run_plan.model_copy(update={"trunk": TrunkPlan(cuts=(1,), num_bytes=1)})
    context, option = context_of(plan), options(plan)[0]
    trial = make_trial(plan, option, 1e-3, 0, 0)
    rung = train_rung(plan, context, trial, option.selection, folder="f", stop_step=1)
    assert rung.trunk == plan.trunk
    anew = trial.model_copy(update={"control": "scratch"})
    assert train_rung(plan, context, anew, option.selection, folder="f", stop_step=1).trunk is None
    none, nothing = none_control(plan, base("tiny"), seed=0)
    assert evaluate_base(plan, context, none, nothing, "f").trunk is None


def test_a_rung_takes_the_plans_execution_unless_told(run_plan: RunPlan) -> None:
    option = options(run_plan)[0]
    trial, refit = make_trial(run_plan, option, 1e-3, 0, 0), run_plan.refit_execution
    given: Any = {"folder": "trials/x", "rung": 1, "start": "trials/x/rung-0", "stop_step": 30}
    rung = train_rung(run_plan, context_of(run_plan), trial, option.selection, **given)
    assert rung.execution == run_plan.execution
    assert (rung.rung, rung.start, rung.stop_step) == (1, "trials/x/rung-0", 30)
    assert rung.num_gangs == run_plan.num_gangs
    made = train_rung(run_plan, context_of(run_plan, refit), trial, option.selection, **given, execution=refit)
    assert made.execution == refit


def test_a_gang_of_other_ranks_stands_alone_and_has_no_figure_of_the_plan(run_plan: RunPlan) -> None:
    option, many = options(run_plan)[0], run_plan.model_copy(update={"num_gangs": 3})
    wide = many.execution.model_copy(update={"ranks": many.execution.ranks + 1})
    trial = make_trial(many, option, 1e-3, 0, 0)
    rung = train_rung(many, context_of(many, wide), trial, option.selection, folder="f", stop_step=1, execution=wide)
    assert (rung.num_gangs, rung.predicted_memory_bytes) == (1, None)
    own = train_rung(many, context_of(many), trial, option.selection, folder="f", stop_step=1)
    assert (own.num_gangs, own.predicted_memory_bytes) == (3, option.memory.total_bytes)
