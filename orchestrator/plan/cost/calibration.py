"""The rate that a run reaches, from its own first steps, and what the whole run costs at that rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.cost.choices import option_terms, planned_options, scored_flops
from orchestrator.plan.cost.estimate import estimate_cost, units_of_gang
from orchestrator.plan.estimates import CostEstimate
from orchestrator.plan.values import RunPlan


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


def calibration_sentence(planned: CostEstimate, found: CostEstimate) -> str:
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
