"""What the plan said beside what the run measured."""

from __future__ import annotations

from pathlib import Path

from orchestrator.plan import LATE_CONTROLS
from orchestrator.plan.cost.calibration import MeasuredSteps, calibrated
from orchestrator.plan.cost.choices import planned_options
from orchestrator.plan.cost.estimate import CPU_FLOPS_PER_CORE, run_flops
from orchestrator.plan.values import RunPlan
from orchestrator.runtime.prepare import Prepared
from orchestrator.transfer.records import PlanAgainstMeasured, RefitRecord, SweepResult


def plan_against_measured(
    prepared: Prepared, sweep: SweepResult, refitted: RefitRecord | None
) -> tuple[PlanAgainstMeasured, ...]:
    """Memory, disk, base loads and computing time.

    Args:
        refitted: How the bundle's trial came to the full budget; None where there is no bundle.
    """
    plan = prepared.plan
    options = plan.search.options if plan.search is not None else (plan.finetune,) if plan.finetune is not None else ()
    planned = max((option.memory.total_bytes for option in options if option is not None), default=None)
    peaks = [trial.engine.peak_memory_bytes for trial in sweep.trials if trial.engine is not None]
    ran_out = sum(trial.out_of_memory for trial in sweep.trials)
    name = "peak memory of a rank"
    if ran_out:  # what fitted was not what was planned
        name, planned = f"{name} ({ran_out} trial{'' if ran_out == 1 else 's'} ran out of memory)", None
    rows = [PlanAgainstMeasured(name=name, planned=planned, measured=max(peaks, default=None), unit="bytes")]
    if refitted is not None:  # the plan counts the bundle too
        folder = sum(file.stat().st_size for file in Path(prepared.run.path).rglob("*") if file.is_file())
        rows.append(PlanAgainstMeasured(name="disk, with the bundle", planned=plan.disk_bytes, measured=folder, unit="bytes"))
    if plan.search is not None:
        gangs, loads = float(plan.num_gangs), float(sweep.base_loads)
        name = "base loads in the last submission's search"
        rows.append(PlanAgainstMeasured(name=name, planned=gangs, measured=loads, unit="count"))
    time = _computing_time(prepared, sweep, refitted)
    rows.append(time)
    found = calibrated(plan, prepared.anatomy, first_steps(plan, sweep))
    hours = found and (found.gpu_hours if plan.execution.device == "cuda" else found.core_hours)
    if hours:
        rows.append(time.model_copy(update={"name": f"{time.name}, at the rate of its first steps", "planned": 3600 * hours}))
    return tuple(rows)


def first_steps(plan: RunPlan, sweep: SweepResult) -> list[MeasuredSteps]:
    """The first rung of every searched trial, its evaluation included."""
    options = [(option.layers, option.method) for option in planned_options(plan)]
    return [
        MeasuredSteps(options.index(key), first.tokens, first.seconds, evaluations=1)
        for trial in sweep.searched
        for first in trial.rungs[:1]
        if (key := (trial.layers, trial.method)) in options and first.tokens
    ]


def _computing_time(prepared: Prepared, sweep: SweepResult, refitted: RefitRecord | None) -> PlanAgainstMeasured:
    """Seconds of training and scoring, summed over GPUs, or over cores where there is none.

    Planned is arithmetic alone at the rates of `plan.cost`; a bundle's merge is in neither, and what is trained late is in both.
    """
    plan = prepared.plan
    on_gpus = plan.execution.device == "cuda"
    searching, refitting = (
        execution.ranks * (1 if on_gpus else execution.threads_per_rank) for execution in (plan.execution, plan.refit_execution)
    )
    planned_late = {*plan.search.controls, "repeat"} if plan.search is not None else set[str]()
    trials = sum(trial.seconds for trial in sweep.trials if trial.control not in LATE_CONTROLS or trial.control in planned_late)
    trials += sweep.learning_curve_seconds
    if plan.search is None:
        measured = trials * refitting
    else:
        measured = trials * searching + (refitted.seconds * refitting if refitted is not None else 0.0)
    if on_gpus:
        planned = plan.gpu_hours * 3600 if plan.gpu_hours is not None else None
    else:
        planned = run_flops(plan, prepared.anatomy) / CPU_FLOPS_PER_CORE
    name = f"{'GPU' if on_gpus else 'core'} time of training and scoring"
    return PlanAgainstMeasured(name=name, planned=planned, measured=measured, unit="seconds")
