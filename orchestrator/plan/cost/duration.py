"""Wall-clock time of a run as a range: computing, and what starting, saving and evaluating add."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.cost.choices import option_terms, scored_flops
from orchestrator.plan.cost.estimate import CPU_FLOPS_PER_CORE, estimate_cost, expected_steps, units_of_gang
from orchestrator.plan.estimates import CostEstimate, Duration
from orchestrator.plan.values import RunPlan, SweepPlan

START_S = (10.0, 60.0)
"""Ray, the gangs' imports, data and scoring the base, before the first step: expected minimum and maximum."""
FINISH_S = (15.0, 120.0)
"""Merging, verification in a fresh process, the test set and the report."""
RUNG_S = (0.05, 1.0)
"""Time of a trial at each rung besides computing: building its branch, saving, reporting."""
STEP_S = (0.0, 0.03)
"""Time of a step besides computing: launching kernels, reading weights for few rows."""
LOAD_BYTES_PER_S = (2e9, 2e8)
"""Rate at which a base is read: from fast local disk, from slow shared storage."""
RATES = (1.5, 0.25)
"""Actual rate relative to the expected one, at most and at least: small shapes, short rows and other load on the machine
reduce it. Measured: between 0.3 and 1.1 on idle cores, 0.05 on overloaded ones."""
CORE_SHARE = 0.4
"""Rate of training on a core relative to a large float32 matrix product: 40 of 80 to 110 GFLOP/s."""
CALIBRATED = (1.25, 0.6)
"""The same ratio once the run's own first steps have been measured."""
NOT_STOPPED = (0.0, 0.3, 0.7)
"""Share of early stopping's possible saving that is lost, for the low, middle and high figure: the first trials at a rung have
no others to be compared with, and later ones are proposed near the good ones."""


class MeasuredTimes(NamedTuple):
    """Times of a run that are known after its first steps."""

    elapsed_s: float
    """Time since the run was planned."""
    computing_s: float
    """Part of it since the first trial began."""
    rung_s: float
    """Time of a gang at each rung of a trial besides the counted operations."""


def planned_duration(plan: RunPlan, cost: CostEstimate, base_bytes: int, core_flops: float = 0.0) -> Duration | None:
    """Estimate the duration before anything has run; None if the rate is unknown.

    Args:
        base_bytes: Bytes that every gang reads before its first step.
        core_flops: Measured rate of a large matrix product on one core of the machines; 0 if it was not measured.
    """
    if cost.wall_hours is None:
        return None
    rungs = _rungs_of_a_gang(plan)
    # The plan assumes CPU_FLOPS_PER_CORE for every core; the clock depends on what this machine's cores really do.
    speed = CORE_SHARE * core_flops / CPU_FLOPS_PER_CORE if core_flops and plan.execution.device == "cpu" else 1.0

    def seconds(end: int, rate: float, not_stopped: float) -> float:
        fixed = START_S[end] + FINISH_S[end] + base_bytes / LOAD_BYTES_PER_S[end]
        fixed += rungs * RUNG_S[end] + _steps_of_a_gang(plan) * STEP_S[end]
        return fixed + _computing(cost, not_stopped) / (rate * speed)

    low, high = seconds(0, RATES[0], NOT_STOPPED[0]), seconds(1, RATES[1], NOT_STOPPED[2])
    # The uncertainty is a factor rather than a number of seconds, so the middle is the geometric mean.
    return Duration(low_s=low, middle_s=(low * high) ** 0.5, high_s=high)


def measured_duration(plan: RunPlan, found: CostEstimate, measured: MeasuredTimes) -> Duration | None:
    """Estimate the duration of the whole run from the rate of its first steps.

    Args:
        found: The cost at that rate.
    """
    if found.wall_hours is None:
        return None
    started, rungs = measured.elapsed_s - measured.computing_s, _rungs_of_a_gang(plan) * measured.rung_s
    ends = (
        (CALIBRATED[0], NOT_STOPPED[0], FINISH_S[0]),
        (1.0, NOT_STOPPED[1], (FINISH_S[0] * FINISH_S[1]) ** 0.5),
        (CALIBRATED[1], NOT_STOPPED[2], FINISH_S[1]),
    )
    low, middle, high = (
        # A run cannot take less time than has already passed.
        max(measured.elapsed_s, started + (_computing(found, not_stopped) + rungs) / rate) + finish
        for rate, not_stopped, finish in ends
    )
    return Duration(low_s=low, middle_s=middle, high_s=high)


def _computing(cost: CostEstimate, not_stopped: float) -> float:
    """Return the seconds of computing; `not_stopped` is the share of early stopping's expected saving that is computed after
    all."""
    assert cost.wall_hours is not None
    expected = sum(part.amount for part in cost.operations)
    more = max(0.0, cost.operations_without_stopping - expected) / expected if expected else 0.0
    return 3600 * cost.wall_hours * (1 + not_stopped * more)


def _steps_of_a_gang(plan: RunPlan) -> float:
    """Return the steps of each gang, with early stopping, including its share of the winner's follow-up trials."""
    if not isinstance(plan, SweepPlan):
        return plan.total_steps
    follow_up = plan.search.repeats * plan.total_steps
    return (plan.search.num_trials * expected_steps(plan.search) + follow_up) / max(1, plan.num_gangs)


def _rungs_of_a_gang(plan: RunPlan) -> float:
    """Return the rungs that each gang trains trials to, at most."""
    if not isinstance(plan, SweepPlan):
        return 1.0
    trials = plan.search.num_trials + plan.search.repeats + 1
    return trials * len(plan.search.rung_steps) / max(1, plan.num_gangs)


class MeasuredSteps(NamedTuple):
    """Steps of one trial as a gang of the plan ran them."""

    option: int
    """Index in the plan's options."""
    tokens: int
    """Tokens trained on, including prompts, without padding."""
    seconds: float
    """Time of the gang."""
    evaluations: int = 0
    """Number of times the eval and retention sets were scored in that time."""


def achieved_share(plan: RunPlan, anatomy: ModelAnatomy, measured: Iterable[MeasuredSteps]) -> float | None:
    """Return operations of the measured steps / (peak x ranks x seconds), or None without a peak or without measured time."""
    peak = plan.cost.rate.peak_flops if plan.cost is not None else None
    options = plan.options
    operations, seconds = 0.0, 0.0
    for steps in measured:
        per_token = sum(term.flops for term in option_terms(plan, anatomy, options[steps.option].selection))
        operations += per_token * steps.tokens + steps.evaluations * scored_flops(plan, anatomy)
        seconds += steps.seconds
    if peak is None or seconds <= 0 or operations <= 0:
        return None
    return operations / (peak * units_of_gang(plan.execution) * seconds)


def calibrated(plan: RunPlan, anatomy: ModelAnatomy, measured: Iterable[MeasuredSteps]) -> CostEstimate | None:
    """Return the plan's cost at the measured share of the peak, or None if there is no measurement."""
    share = achieved_share(plan, anatomy, measured)
    if share is None or plan.cost is None:
        return None
    source = f"{plan.cost.rate.source.partition('; share')[0]}; share: measured in the run's first steps"
    rate = plan.cost.rate.model_copy(update={"achieved_share": share, "calibrated": True, "source": source})
    return estimate_cost(plan, anatomy, rate, price_per_gpu_hour=plan.cost.price_per_gpu_hour)


def calibration_message(planned: CostEstimate, found: CostEstimate, steps: str = "the first steps") -> str:
    """Return a message such as `the first steps reach 41% of the peak: about 12.3 GPU-hours in all (14.4 at the 35% that the
    plan assumed)`."""
    if found.core_hours is not None and planned.core_hours is not None and found.rate.flops is not None:
        return (
            f"{steps} reach {found.rate.flops / 1e9:.3g} GFLOP/s per core: about {found.core_hours:.3g} core-hours in "
            f"all ({planned.core_hours:.3g} by the plan)"
        )
    assert found.gpu_hours is not None
    assert planned.gpu_hours is not None
    return (
        f"{steps} reach {found.rate.achieved_share:.0%} of the peak: about {found.gpu_hours:.3g} GPU-hours in all "
        f"({planned.gpu_hours:.3g} at the {planned.rate.achieved_share:.0%} that the plan assumed)"
    )
