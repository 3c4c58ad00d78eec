"""The result of a search: the promotion, what ended it, and the plan against what was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from orchestrator.plan import FOLLOW_UP_CONTROLS, follow_up_controls
from orchestrator.plan.cost.duration import MeasuredSteps, calibrated
from orchestrator.plan.cost.estimate import CPU_FLOPS_PER_CORE, run_flops
from orchestrator.plan.values import RunPlan, SweepPlan
from orchestrator.run.hours import HoursState
from orchestrator.run.ledger import Ledger, base_result
from orchestrator.run.records import trial_records
from orchestrator.runtime.assignments import GangFigures
from orchestrator.runtime.follow_up_trials import curve_ids, curve_of
from orchestrator.runtime.prepare import Prepared
from orchestrator.store import write_json
from orchestrator.transfer import Comparison, Promotion, paired_comparison, pareto_front, promote
from orchestrator.transfer.learning_curve import LearningCurve
from orchestrator.transfer.promotion import PROMOTABLE_CONTROLS
from orchestrator.transfer.records import PlanAgainstMeasured, RefitRecord, SweepResult, TrialRecord

MORE_HOURS = "raise resources.max_gpu_hours and submit again: the search continues where it ended"


def summarise(
    prepared: Prepared,
    ledger: Ledger,
    figures: Sequence[GangFigures],
    started_at: float,
    earlier: SweepResult | None = None,
    hours: HoursState | None = None,
) -> SweepResult:
    """Summarise the search and decide the promotion; write both to sweep.json, still without an end time.

    Args:
        figures: The time of each gang in this submission.
        started_at: Unix time of this submission.
        earlier: The summary of earlier submissions; their time counts.
        hours: The GPU-hours of the search, and whether they ended it.
    """
    scoring = prepared.scoring
    trials = trial_records(ledger, scoring)
    promotion = decide(prepared, ledger, trials)
    winner = ledger.get(promotion.trial_id) if promotion.trial_id is not None else None
    follow_ups = follow_up_controls(prepared.plan, winner.trial.trial_id) if winner is not None else {}
    promotable = [t for t in trials if t.control in PROMOTABLE_CONTROLS and t.state != "failed" and t.metric is not None]
    front = pareto_front([(_target(trial, scoring.higher_is_better), trial.forgetting or 0.0) for trial in promotable])
    curve = curve_of(prepared, ledger, winner)
    points = curve_ids(prepared, winner, base_result(ledger)) if winner is not None else []
    ended_by_hours = _ended_by_hours(prepared, ledger, hours, follow_ups, points)
    result = SweepResult(
        name=prepared.spec.name,
        job="sweep" if isinstance(prepared.plan, SweepPlan) else "finetune",
        task=prepared.spec.task,
        metric=scoring.metric,
        higher_is_better=scoring.higher_is_better,
        max_forgetting=scoring.max_forgetting,
        trials=tuple(
            trial
            for trial in trials
            if trial.control != "curve" and (trial.control not in FOLLOW_UP_CONTROLS or trial.trial_id in follow_ups.values())
        ),
        winner_id=promotion.trial_id,
        promotion_reason=promotion.reason,
        advice=((MORE_HOURS,) if ended_by_hours else ()) + promotion.advice,
        front=tuple(promotable[index].trial_id for index in front),
        num_gangs=prepared.plan.num_gangs,
        ranks_per_gang=prepared.plan.execution.ranks,
        base_loads=sum(gang.base_loads for gang in figures),
        gangs_replaced=sum(gang.replaced for gang in figures),
        gang_idle_seconds=sum(sum(gang.idle_s) for gang in figures),
        first_trial_seconds=_first_trial_seconds(ledger, started_at),
        wall_seconds=time.time() - started_at + (earlier.wall_seconds if earlier else 0.0),
        started_at=earlier.started_at if earlier else started_at,
        num_submissions=len(prepared.run.identity["submissions"]),
        gpu_hours_used=hours.used if hours is not None else 0.0,
        max_gpu_hours=prepared.spec.resources.max_gpu_hours,
        ended_by_hours=ended_by_hours,
        learning_curve=curve if isinstance(curve, LearningCurve) else None,
        no_learning_curve=curve if isinstance(curve, str) else "",
        learning_curve_seconds=sum(trial.seconds for trial in trials if trial.trial_id in points),
    )
    write_json(prepared.run.sweep, result)
    return result


def _ended_by_hours(
    prepared: Prepared, ledger: Ledger, hours: HoursState | None, follow_ups: Mapping[str, str], points: Sequence[str]
) -> str:
    """Return how far the search came where the GPU-hour bound stopped a trial or a control; empty where it did not.

    Args:
        follow_ups: The ids of the promoted trial's controls, by name.
        points: Ids of the trials of its learning curve.
    """
    if hours is None or not hours.spent or not isinstance(prepared.plan, SweepPlan):
        return ""
    done = sum(entry.trial.control is None and entry.ended_for_good for entry in ledger.entries())
    asked = prepared.plan.search.num_trials
    if done < asked:
        return f"the search was ended after {done} of {asked} trials: {hours.spent}"
    controls = [name for name, trial_id in {"head": "head", **follow_ups}.items() if _is_missing(ledger, trial_id)]
    missing = [f"the control {' and '.join(controls)}"] if controls else []
    missing += ["the learning curve"] if any(_is_missing(ledger, trial_id) for trial_id in points) else []
    if not missing:
        return ""
    return f"all {asked} trials were searched, but out of GPU-hours for {' and '.join(missing)}: {hours.spent}"


def _is_missing(ledger: Ledger, trial_id: str) -> bool:
    entry = ledger.get(trial_id)
    return entry is None or not entry.ended_for_good


def decide(prepared: Prepared, ledger: Ledger, trials: Sequence[TrialRecord]) -> Promotion:
    """Decide which trial is promoted, from the paired differences to the base model on the eval set."""
    base = next((trial for trial in trials if trial.control == "none"), None)
    return promote(
        trials,
        base,
        prepared.scoring.max_forgetting,
        higher_is_better=prepared.scoring.higher_is_better,
        metric=prepared.scoring.metric,
        comparisons=_eval_comparisons(prepared, ledger),
    )


def _eval_comparisons(prepared: Prepared, ledger: Ledger) -> dict[str, Comparison]:
    """Compare every trial with the base model by per-document losses on the eval set; only where the metric is the loss."""
    none = ledger.get("none")
    if prepared.scoring.metric != "loss" or none is None or not none.results:
        return {}
    base = ledger.document_losses(none.results[-1])
    compared: dict[str, Comparison] = {}
    for entry in ledger.entries():
        result = prepared.scoring.judged(entry.results, none.results[-1]) if entry.results else None
        if base is None or result is None or result.state != "done" or entry is none:
            continue
        own = ledger.document_losses(result)
        if own is not None and np.isfinite(own[0]).all():
            seed = prepared.spec.train.seed
            compared[entry.trial.trial_id] = paired_comparison(own[0], base[0], base[1], seed, num_resamples=2000)
    return compared


def _target(trial: TrialRecord, higher_is_better: bool) -> float:
    value = trial.metric if trial.metric is not None else float("nan")
    return -value if higher_is_better else value


def _first_trial_seconds(ledger: Ledger, started_at: float) -> float | None:
    """Return the seconds from the submission to its first step of a searched trial; None where it made none."""
    stretches = [
        (result, result.step - (entry.results[index - 1].step if index else 0))
        for entry in ledger.entries()
        for index, result in enumerate(entry.results)
        if entry.trial.control is None and result.started_at > started_at
    ]
    if not stretches:
        return None
    first, num_steps = min(stretches, key=lambda stretch: stretch[0].started_at)
    return first.started_at - started_at + first.train_seconds / max(1, num_steps)


def plan_against_measured(
    prepared: Prepared, sweep: SweepResult, refitted: RefitRecord | None
) -> tuple[PlanAgainstMeasured, ...]:
    """Compare the plan with what was measured: memory, disk, base loads and computing time.

    Args:
        refitted: The refit of the bundled trial; None where there is no bundle.
    """
    plan = prepared.plan
    planned = max((option.memory.total_bytes for option in plan.options), default=None)
    peaks = [trial.engine.peak_memory_bytes for trial in sweep.trials if trial.engine is not None]
    ran_out = sum(trial.out_of_memory for trial in sweep.trials)
    name = "peak memory of a rank"
    if ran_out:  # what fitted was not what was planned
        name, planned = f"{name} ({ran_out} trial{'' if ran_out == 1 else 's'} ran out of memory)", None
    rows = [PlanAgainstMeasured(name=name, planned=planned, measured=max(peaks, default=None), unit="bytes")]
    if refitted is not None:  # the plan counts the bundle too
        folder = sum(file.stat().st_size for file in Path(prepared.run.path).rglob("*") if file.is_file())
        rows.append(PlanAgainstMeasured(name="disk, with the bundle", planned=plan.disk_bytes, measured=folder, unit="bytes"))
    if isinstance(plan, SweepPlan):
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
    """Return the first rung of every searched trial, with its evaluation."""
    options = [(option.layers, option.method) for option in plan.options]
    return [
        MeasuredSteps(options.index(key), first.tokens, first.seconds, evaluations=1)
        for trial in sweep.searched
        for first in trial.rungs[:1]
        if (key := (trial.layers, trial.method)) in options and first.tokens
    ]


def _computing_time(prepared: Prepared, sweep: SweepResult, refitted: RefitRecord | None) -> PlanAgainstMeasured:
    """Return the seconds of training and scoring, summed over GPUs, or over cores without them.

    The plan counts arithmetic operations at the rates of `plan.cost`. Neither side includes the merge; both include the follow-up
    trials.
    """
    plan = prepared.plan
    on_gpus = plan.execution.device == "cuda"
    searching, refitting = (
        execution.ranks * (1 if on_gpus else execution.threads_per_rank) for execution in (plan.execution, plan.refit_execution)
    )
    planned_follow_ups = {*plan.search.controls, "repeat"} if isinstance(plan, SweepPlan) else set[str]()
    trials = sum(
        trial.seconds for trial in sweep.trials if trial.control not in FOLLOW_UP_CONTROLS or trial.control in planned_follow_ups
    )
    trials += sweep.learning_curve_seconds
    if not isinstance(plan, SweepPlan):
        measured = trials * refitting
    else:
        measured = trials * searching + (refitted.seconds * refitting if refitted is not None else 0.0)
    if on_gpus:
        planned = plan.gpu_hours * 3600 if plan.gpu_hours is not None else None
    else:
        planned = run_flops(plan, prepared.anatomy) / CPU_FLOPS_PER_CORE
    name = f"{'GPU' if on_gpus else 'core'} time of training and scoring"
    return PlanAgainstMeasured(name=name, planned=planned, measured=measured, unit="seconds")
