"""Time by the clock: a range before the run, a narrower one once its first steps are known."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.plan import make_plan
from orchestrator.plan.cost.duration import (
    FINISH_S,
    START_S,
    MeasuredSteps,
    MeasuredTimes,
    calibrated,
    measured_duration,
    planned_duration,
)
from orchestrator.plan.cost.estimate import CPU_FLOPS_PER_CORE
from orchestrator.plan.explain import cost_line
from orchestrator.plan.values import RunPlan


@pytest.fixture
def plan(base: Any, job: Any, data: Any) -> Any:
    def build(cluster: Any, name: str = "tiny", kind: Any = "sweep", **sections: Any) -> RunPlan:
        return make_plan(job(**sections), base(name), data(), cluster, job=kind, spec_sha256="0" * 64)

    return build


def test_a_plan_says_a_range_that_holds_its_arithmetic(plan: Any, cores: Any) -> None:
    found = plan(cores(2))
    duration, arithmetic = found.cost.duration, 3600 * found.cost.wall_hours
    assert START_S[0] + FINISH_S[0] + arithmetic / 2 < duration.low_s < duration.middle_s < duration.high_s
    assert duration.high_s > START_S[1] + FINISH_S[1] + 4 * arithmetic
    assert str(duration) in cost_line(found)


def test_an_unknown_gpu_has_no_time(plan: Any, gpus: Any) -> None:
    assert plan(gpus(name="Quantum 9000"), "8b", quantize="nf4").cost.duration is None


def test_what_was_measured_of_a_core_moves_the_time_and_nothing_else(plan: Any, cores: Any) -> None:
    cluster = cores(2)
    (node,) = cluster.nodes
    slow = cluster.model_copy(update={"nodes": (node.model_copy(update={"core_flops": 10e9}),)})
    usual, slower = plan(cluster), plan(slow)
    assert slower.cost.duration.high_s > 3 * usual.cost.duration.high_s > 0
    without = {"duration": None}
    assert slower.cost.model_copy(update=without) == usual.cost.model_copy(update=without)
    assert slower.model_copy(update={"cost": None}) == usual.model_copy(update={"cost": None}), "nothing is decided by it"


def test_no_stopping_takes_longer_than_stopping(plan: Any, cores: Any) -> None:
    asha, none = (plan(cores(2), search={"scheduler": scheduler}).cost.duration for scheduler in ("asha", "none"))
    assert none.low_s > asha.low_s
    assert asha.high_s / asha.low_s > none.high_s / none.low_s, "how many are stopped is not known before"


@pytest.mark.parametrize("slower", [1.0, 20.0])
def test_the_first_steps_narrow_it(plan: Any, base: Any, cores: Any, slower: float) -> None:
    """A machine that computes at a twentieth of the planned rate, its twentieth second of computing over."""
    found = plan(cores(2))
    per_token = found.cost.options[0].flops_per_token
    speed = CPU_FLOPS_PER_CORE / slower / per_token
    cost = calibrated(found, base("tiny"), [MeasuredSteps(0, round(speed), 1.0)])
    assert cost is not None
    times = MeasuredTimes(elapsed_s=40.0, computing_s=20.0, rung_s=0.0)
    narrowed = measured_duration(found, cost, times)
    assert narrowed is not None
    arithmetic = slower * 3600 * found.cost.wall_hours
    assert narrowed.low_s == pytest.approx(20 + arithmetic / 1.25 + FINISH_S[0], rel=0.01)
    assert arithmetic < narrowed.middle_s < 3 * (arithmetic + 60)
    planned = planned_duration(found, found.cost, 0)
    assert planned is not None
    assert narrowed.high_s / narrowed.low_s < planned.high_s / planned.low_s


def test_it_is_never_over_before_what_has_passed(plan: Any, base: Any, cores: Any) -> None:
    found = plan(cores(2))
    cost = calibrated(found, base("tiny"), [MeasuredSteps(0, 10**9, 1.0)])
    assert cost is not None
    follow_up = measured_duration(found, cost, MeasuredTimes(elapsed_s=900.0, computing_s=800.0, rung_s=0.0))
    assert follow_up is not None
    assert follow_up.low_s == 900 + FINISH_S[0]
