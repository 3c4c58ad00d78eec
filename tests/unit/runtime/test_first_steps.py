"""The first rungs of a sweep say what the rest of it will take; the record holds it against what it took."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan import make_plan, make_trial
from orchestrator.plan.cost.duration import MeasuredSteps, calibrated
from orchestrator.plan.values import ClusterDescription, DataSize, NodeDescription, RunPlan
from orchestrator.run.ledger import Ledger
from orchestrator.run.records import judge_trials
from orchestrator.run.scoring import Scoring
from orchestrator.runtime.assignments import Orders
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.first_steps import FirstSteps
from orchestrator.runtime.outcome import plan_against_measured, summarise
from orchestrator.runtime.prepare import Prepared
from orchestrator.spec import load_spec
from orchestrator.transfer.records import RefitRecord
from orchestrator.units import GIB
from orchestrator.work.execution import DataPaths, TrainSettings
from orchestrator.work.results import RungResult


def result(trial_id: str = "t0", *, rung: int = 0, seconds: float = 2.0, **changes: object) -> RungResult:
    values = {"trial_id": trial_id, "rung": rung, "step": 4, "tokens": 2000, "state": "done", "eval_loss": 2.0}
    return RungResult.model_validate({**values, "train_seconds": seconds, **changes})


def test_it_is_told_once_when_every_gang_has_had_some(plan: RunPlan, anatomy: ModelAnatomy) -> None:
    first = FirstSteps(plan, anatomy, num_gangs=2)
    assert first.add(0, result("t0", steady_tokens_per_s=1000)) is None
    said = first.add(1, result("t1", steady_tokens_per_s=650))
    assert said is not None
    expected = calibrated(plan, anatomy, [MeasuredSteps(0, 1000, 1.0), MeasuredSteps(1, 650, 1.0)])
    assert expected is not None
    assert said["achieved_share"] == expected.rate.achieved_share
    assert (said["core_hours"], said["gpu_hours"], said["wall_hours"]) == (expected.core_hours, None, expected.wall_hours)
    assert re.match(r"about \S+ left, \S+ in all \(.* to .*; the plan said .*\): the first steps reach ", said["message"])
    assert (said["kind"], said["low_seconds"] < said["expected_seconds"] < said["high_seconds"]) == ("first_steps", True)
    assert first.add(0, result("t2", steady_tokens_per_s=1000)) is None


def test_a_trial_that_only_warmed_up_counts_until_there_are_steady_steps(plan: RunPlan, anatomy: ModelAnatomy) -> None:
    """Two steps of a first rung take hundreds of times as long as the same two later."""
    first = FirstSteps(plan, anatomy, num_gangs=1)
    slow = first.add(0, result("t0", tokens=1000, seconds=60.0))
    assert slow is not None
    again = first.add(0, result("t1", tokens=1000, seconds=2.0, steady_tokens_per_s=5000.0))
    assert again is not None
    assert again["kind"] == "estimate"
    steady = calibrated(plan, anatomy, [MeasuredSteps(0, 5000, 1.0)])
    assert steady is not None
    assert again["core_hours"] == steady.core_hours
    assert again["core_hours"] < slow["core_hours"] / 100
    assert again["expected_seconds"] < slow["expected_seconds"] / 3


def test_a_recorded_run_took_what_was_told(anatomy: ModelAnatomy, tmp_path: Path) -> None:
    """300 rows and nothing but base, task and data, on two cores that were shared with other work."""
    recorded = json.loads((Path(__file__).parent / "recorded" / "few_rows.json").read_text())
    spec = {"name": "few", "base": {"model": "sample"}, "task": "completion", "data": {"train": "rows.jsonl"}, "search": {}}
    spec["search"] = {"layers": ["last:2", "last:4", "all"], "trials": 12}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    cluster = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=16 * GIB),))
    size, seconds = DataSize.model_validate(recorded["data"]), recorded["seconds"]
    plan = make_plan(load_spec(tmp_path / "spec.yaml"), anatomy, size, cluster, job="sweep", spec_sha256="0" * 64)
    assert plan.cost is not None
    assert plan.cost.duration is not None
    assert plan.cost.duration.low_s < seconds < plan.cost.duration.high_s
    told, now = [], [0.0]
    first = FirstSteps(plan, anatomy, num_gangs=2, begun=0.0, clock=lambda: now[0])
    for number, (option, rung, step, tokens, steady, training, scoring, started, finished, _) in enumerate(recorded["rows"]):
        now[0] = finished
        times = {"train_seconds": training, "eval_seconds": scoring, "started_at": started, "finished_at": finished}
        values = {"trial_id": f"t{number}", "rung": rung, "step": step, "tokens": tokens, "state": "done", "eval_loss": 1.0}
        heard = first.add(option, RungResult.model_validate({**values, **times, "steady_tokens_per_s": steady}))
        told += [heard] if heard is not None else []
    assert [event["kind"] for event in told[:1]] == ["first_steps"]
    assert len(told) <= 4, "told again only where it says something else"
    for event in told:
        assert event["low_seconds"] < seconds < event["high_seconds"]
        assert seconds / 3 < event["expected_seconds"] < 3 * seconds


@pytest.mark.parametrize(
    ("option", "heard"),
    [(None, result()), (0, result(rung=1)), (0, result(state="failed", reason="NaN")), (0, result(seconds=0.0))],
    ids=["a control", "a later rung", "a failure", "no time"],
)
def test_what_says_nothing(plan: RunPlan, anatomy: ModelAnatomy, option: int | None, heard: RungResult) -> None:
    assert FirstSteps(plan, anatomy, num_gangs=1).add(option, heard) is None


def test_a_plan_of_an_older_version_is_no_trouble(plan: RunPlan, anatomy: ModelAnatomy) -> None:
    assert FirstSteps(plan.model_copy(update={"cost": None}), anatomy, 1).add(0, result()) is None


def test_the_exchange_tells_it(plan: RunPlan, anatomy: ModelAnatomy, tmp_path: Path) -> None:
    orders = Orders(
        plan=plan,
        anatomy=anatomy,
        settings=TrainSettings(warmup=0, schedule="constant", weight_decay=0, grad_clip=0, tokens_per_step=512),
        data=DataPaths(train="train.npz", eval="eval.npz"),
        scoring=Scoring(metric="loss", max_forgetting=1),
        trials_folder=str(tmp_path),
        num_gangs=1,
        hours_file=str(tmp_path / "hours.json"),
    )
    exchange = Exchange(orders)
    trial = make_trial(plan, plan.search.options[0], 1e-3, 0, seed=0).model_copy(update={"trial_id": "t0"})
    exchange._ledger.register(trial, 0)
    exchange._record(result())
    exchange._record(result(rung=1))
    (told,) = [item for item in exchange._news if item["kind"] == "first_steps"]
    assert "core-hours in all" in told["message"]


def test_the_record_has_the_time_at_that_rate_too(submit: Callable[[], Prepared]) -> None:
    prepared = submit()
    plan = prepared.plan
    trial = make_trial(plan, plan.search.options[0], 1e-3, 0, seed=0)
    ledger = Ledger(prepared.run.trials)
    ledger.register(trial, 0)
    ledger.add(result(trial.trial_id, eval_seconds=1.0, checkpoint="/t0"))
    ledger.end(trial.trial_id, "finished")
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    rows = {row.name: row for row in plan_against_measured(prepared, sweep, RefitRecord(ran=False, reason=""))}
    row = rows["core time of training and scoring, at the rate of its first steps"]
    expected = calibrated(plan, prepared.anatomy, [MeasuredSteps(0, 2000, 3.0, evaluations=1)])
    assert expected is not None
    assert expected.core_hours is not None
    assert row.planned == pytest.approx(3600 * expected.core_hours)
    assert row.measured == rows["core time of training and scoring"].measured
