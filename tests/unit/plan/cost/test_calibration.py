"""From the tokens a second of the first steps to the cost of the whole run."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.plan import make_plan
from orchestrator.plan.cost.choices import scored_flops
from orchestrator.plan.cost.duration import MeasuredSteps, achieved_share, calibrated, calibration_message
from orchestrator.plan.cost.estimate import ACHIEVED_SHARE
from orchestrator.plan.values import ClusterDescription, RunPlan


@pytest.fixture
def plan(base: Any, job: Any, data: Any, gpus: Any) -> Any:
    def build(cluster: ClusterDescription | None = None, name: str = "8b", **sections: Any) -> RunPlan:
        sections = {"search": {"layers": ["last:2", "all"]}, **sections}
        loaded = job(quantize="nf4", **sections)
        return make_plan(loaded, base(name), data(), cluster or gpus(), job="sweep", spec_sha256="0" * 64)

    return build


def steps_at(plan: RunPlan, share: float, option: int, tokens: int) -> MeasuredSteps:
    """What a gang would take if it reached this share."""
    assert plan.cost is not None
    assert plan.cost.rate.peak_flops is not None
    rate = plan.cost.rate.peak_flops * share * plan.execution.ranks
    return MeasuredSteps(option, tokens, plan.cost.options[option].flops_per_token * tokens / rate)


def test_the_share_is_found_again_whatever_the_trials(plan: Any, base: Any) -> None:
    planned = plan()
    measured = [steps_at(planned, 0.41, 0, 30_000), steps_at(planned, 0.41, 1, 9_000)]
    assert achieved_share(planned, base("8b"), measured) == pytest.approx(0.41)
    uneven = [steps_at(planned, 0.5, 0, 10_000), steps_at(planned, 0.25, 1, 10_000)]
    assert 0.25 < achieved_share(planned, base("8b"), uneven) < 0.5


def test_ranks_of_a_gang_share_the_work(plan: Any, base: Any) -> None:
    one, four = plan(), plan(resources={"ranks_per_gang": 4})
    steps = MeasuredSteps(0, 10_000, 2.0)
    shares = [achieved_share(planned, base("8b"), [steps]) for planned in (one, four)]
    assert shares[0] == pytest.approx(4 * shares[1])


def test_scoring_in_the_measured_time_counts(plan: Any, base: Any) -> None:
    planned = plan()
    steps = steps_at(planned, 0.3, 0, 30_000)
    extra = scored_flops(planned, base("8b")) / (planned.cost.rate.peak_flops * 0.3)
    with_scoring = steps._replace(seconds=steps.seconds + extra, evaluations=1)
    assert achieved_share(planned, base("8b"), [with_scoring]) == pytest.approx(0.3)


def test_hours_follow_the_share_and_operations_stay(plan: Any, base: Any) -> None:
    planned = plan(resources={"gpu_hour_price": 2.0})
    found = calibrated(planned, base("8b"), [steps_at(planned, 0.41, 1, 9_000)])
    assert found is not None
    factor = ACHIEVED_SHARE / 0.41
    for name in ("gpu_hours", "gpu_hours_without_stopping", "wall_hours", "price"):
        assert getattr(found, name) == pytest.approx(getattr(planned.cost, name) * factor)
    assert found.operations == planned.cost.operations
    assert found.rate.calibrated
    assert found.rate.source.endswith("share: measured in the run's first steps")
    assert calibration_message(planned.cost, found) == (
        f"the first steps reach 41% of the peak: about {found.gpu_hours:.3g} GPU-hours in all "
        f"({planned.gpu_hours:.3g} at the 35% that the plan assumed)"
    )


def test_cores_are_calibrated_too(plan: Any, base: Any, cores: Any) -> None:
    planned = plan(cores(2), "tiny", search={"layers": ["last:2"]})
    rate = planned.cost.rate.flops * planned.execution.threads_per_rank
    seconds = planned.cost.options[0].flops_per_token * 1000 / rate
    found = calibrated(planned, base("tiny"), [MeasuredSteps(0, 1000, 2 * seconds)])
    assert found is not None
    assert found.core_hours == pytest.approx(2 * planned.cost.core_hours)
    assert "20 GFLOP/s per core" in calibration_message(planned.cost, found)


def test_nothing_is_made_up(plan: Any, base: Any, gpus: Any) -> None:
    planned = plan()
    assert calibrated(planned, base("8b"), []) is None
    assert calibrated(planned, base("8b"), [MeasuredSteps(0, 1000, 0.0)]) is None
    unknown = plan(gpus(name="Quantum 9000"))
    assert calibrated(unknown, base("8b"), [MeasuredSteps(0, 1000, 1.0)]) is None
    assert calibrated(planned.model_copy(update={"cost": None}), base("8b"), [MeasuredSteps(0, 1000, 1.0)]) is None
