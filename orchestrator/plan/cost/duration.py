"""How long a run takes by the clock, as a range: what is computed, and what starting, saving and judging take beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.cost.choices import option_terms, planned_options, scored_flops
from orchestrator.plan.cost.estimate import CPU_FLOPS_PER_CORE, estimate_cost, expected_steps, units_of_gang
from orchestrator.plan.estimates import CostEstimate, Duration
from orchestrator.plan.values import RunPlan

START_S = (10.0, 60.0)
"""Ray, the gangs' imports, data and the base's figures, before the first step: least and most that is expected."""
FINISH_S = (15.0, 120.0)
"""Merge, verification in a fresh process, the test set and the report."""
RUNG_S = (0.05, 1.0)
"""Of a trial at each rung, beside arithmetic: building its branch, saving, answering."""
STEP_S = (0.0, 0.03)
"""Of a step, beside arithmetic: launching kernels, reading weights for few rows."""
LOAD_BYTES_PER_S = (2e9, 2e8)
"""How fast a base is read: fast local disk, slow shared storage."""
RATES = (1.5, 0.25)
"""Of the rate that is counted on, what a run may reach: more than the plan assumes, or what small shapes, short rows and a
machine with other work leave of it. Measured between 0.3 and 1.1 of it on quiet cores, 0.05 on crowded ones."""
CORE_SHARE = 0.4
"""Of what a core does in a large float32 product, what training reaches on it: 40 of 80 to 110 GFLOP/s."""
CALIBRATED = (1.25, 0.6)
"""The same once a run's own first steps have been measured."""
NOT_STOPPED = (0.0, 0.3, 0.7)
"""Of what early stopping may save, how much it does not, for the low, the middle and the high figure. The first trials at a rung
have nobody to lose against, and later ones are proposed by what did well."""


class MeasuredTimes(NamedTuple):
    """What of a run is known once it has taken its first steps."""

    elapsed_s: float
    """Since the run was planned."""
    computing_s: float
    """Of it, since its first trial began."""
    rung_s: float
    """Of a gang at each rung of a trial, beside the arithmetic that is counted."""


def planned_duration(plan: RunPlan, cost: CostEstimate, base_bytes: int, core_flops: float = 0.0) -> Duration | None:
    """Before anything has run; None where the rate is unknown.

    Args:
        base_bytes: What every gang reads before its first step.
        core_flops: Of a large product of matrices on one core of the machines, measured; 0 where it was not.
    """
    if cost.wall_hours is None:
        return None
    rungs = _rungs_of_a_gang(plan)
    speed = CORE_SHARE * core_flops / CPU_FLOPS_PER_CORE if core_flops and plan.execution.device == "cpu" else 1.0

    def seconds(end: int, rate: float, not_stopped: float) -> float:
        fixed = START_S[end] + FINISH_S[end] + base_bytes / LOAD_BYTES_PER_S[end]
        fixed += rungs * RUNG_S[end] + _steps_of_a_gang(plan) * STEP_S[end]
        return fixed + _computing(cost, not_stopped) / (rate * speed)

    low, high = seconds(0, RATES[0], NOT_STOPPED[0]), seconds(1, RATES[1], NOT_STOPPED[2])
    return Duration(low_s=low, middle_s=(low * high) ** 0.5, high_s=high)


def measured_duration(plan: RunPlan, found: CostEstimate, measured: MeasuredTimes) -> Duration | None:
    """Of the whole run, at the rate that its first steps reached.

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
        max(measured.elapsed_s, started + (_computing(found, not_stopped) + rungs) / rate) + finish
        for rate, not_stopped, finish in ends
    )
    return Duration(low_s=low, middle_s=middle, high_s=high)


def _computing(cost: CostEstimate, not_stopped: float) -> float:
    """Seconds of arithmetic; of what early stopping is expected to save, `not_stopped` is computed all the same."""
    assert cost.wall_hours is not None
    expected = sum(part.amount for part in cost.operations)
    more = max(0.0, cost.operations_without_stopping - expected) / expected if expected else 0.0
    return 3600 * cost.wall_hours * (1 + not_stopped * more)


def _steps_of_a_gang(plan: RunPlan) -> float:
    """Steps that each gang makes, with early stopping, and those of the winner's trainings."""
    if plan.search is None:
        return plan.total_steps
    follow_up = plan.search.repeats * plan.total_steps
    return (plan.search.num_trials * expected_steps(plan.search) + follow_up) / max(1, plan.num_gangs)


def _rungs_of_a_gang(plan: RunPlan) -> float:
    """Rungs that each gang carries trials to, at most."""
    if plan.search is None:
        return 1.0
    trials = plan.search.num_trials + plan.search.repeats + 1
    return trials * len(plan.search.rung_steps) / max(1, plan.num_gangs)


class MeasuredSteps(NamedTuple):
    """Steps of one trial as a gang of the plan ran them."""

    option: int
    """Index in the plan's options."""
    tokens: int
    """Trained on, with prompts and without padding."""
    seconds: float
    """Of the gang."""
    evaluations: int = 0
    """How often the eval and retention sets were scored in that time."""


def achieved_share(plan: RunPlan, anatomy: ModelAnatomy, measured: Iterable[MeasuredSteps]) -> float | None:
    """Share of the peak: operations of the measured steps over peak x ranks x seconds. None without a peak or a second."""
    peak = plan.cost.rate.peak_flops if plan.cost is not None else None
    options = planned_options(plan)
    operations, seconds = 0.0, 0.0
    for steps in measured:
        per_token = sum(term.flops for term in option_terms(plan, anatomy, options[steps.option].selection))
        operations += per_token * steps.tokens + steps.evaluations * scored_flops(plan, anatomy)
        seconds += steps.seconds
    if peak is None or seconds <= 0 or operations <= 0:
        return None
    return operations / (peak * units_of_gang(plan.execution) * seconds)


def calibrated(plan: RunPlan, anatomy: ModelAnatomy, measured: Iterable[MeasuredSteps]) -> CostEstimate | None:
    """The plan's cost at the share of the peak that these steps reached; None where none can be told."""
    share = achieved_share(plan, anatomy, measured)
    if share is None or plan.cost is None:
        return None
    source = f"{plan.cost.rate.source.partition('; share')[0]}; share: measured in the run's first steps"
    rate = plan.cost.rate.model_copy(update={"achieved_share": share, "calibrated": True, "source": source})
    return estimate_cost(plan, anatomy, rate, price_per_gpu_hour=plan.cost.price_per_gpu_hour)


def calibration_message(planned: CostEstimate, found: CostEstimate) -> str:
    """`the first steps reach 41% of the peak: about 12.3 GPU-hours in all (14.4 at the 35% that the plan assumed)`."""
    if found.core_hours is not None and planned.core_hours is not None and found.rate.flops is not None:
        return (
            f"the first steps reach {found.rate.flops / 1e9:.3g} GFLOP/s a core: about {found.core_hours:.3g} core-hours in all "
            f"({planned.core_hours:.3g} by the plan)"
        )
    assert found.gpu_hours is not None
    assert planned.gpu_hours is not None
    return (
        f"the first steps reach {found.rate.achieved_share:.0%} of the peak: about {found.gpu_hours:.3g} GPU-hours in all "
        f"({planned.gpu_hours:.3g} at the {planned.rate.achieved_share:.0%} that the plan assumed)"
    )
