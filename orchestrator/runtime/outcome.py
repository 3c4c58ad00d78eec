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
from orchestrator.run.records import JudgedTrial
from orchestrator.run.scoring import Scoring
from orchestrator.runtime.assignments import GangFigures
from orchestrator.runtime.follow_up_trials import measure_curve
from orchestrator.runtime.prepare import Prepared
from orchestrator.store import write_json
from orchestrator.transfer import Comparison, Promotion, paired_comparison, promote
from orchestrator.transfer.promotion import front_of
from orchestrator.transfer.records import PlanAgainstMeasured, RefitRecord, SweepResult

MORE_HOURS = "raise resources.max_gpu_hours and submit again: the search continues where it ended"


def summarise(
    prepared: Prepared,
    trials: Mapping[str, JudgedTrial],
    figures: Sequence[GangFigures],
    started_at: float,
    earlier: SweepResult | None = None,
    hours: HoursState | None = None,
) -> SweepResult:
    """Summarise the search and decide the promotion; write both to sweep.json, still without an end time.

    Args:
        trials: The run's trials and controls as `judge_trials` returns them.
        figures: The time of each gang in this submission.
        started_at: Unix time of this submission.
        earlier: The summary of earlier submissions; their time counts.
        hours: The GPU-hours of the search, and whether they ended it.
    """
    scoring, plan = prepared.scoring, prepared.plan
    records = [trial.record for trial in trials.values()]
    first_trial_seconds = _first_trial_seconds(trials, started_at)
    promotion = _decide(trials, scoring, prepared.spec.train.seed)
    front = front_of(records, higher_is_better=scoring.higher_is_better)
    winner = trials[promotion.trial_id] if promotion.trial_id is not None else None
    follow_ups = follow_up_controls(plan, winner.trial.trial_id) if winner is not None else {}
    curve = measure_curve(prepared, trials, winner)
    ended_by_hours = _hours_sentence(plan, trials, hours, follow_ups, curve.trial_ids)
    result = SweepResult(
        name=prepared.spec.name,
        job="sweep" if isinstance(plan, SweepPlan) else "finetune",
        task=prepared.spec.task,
        metric=scoring.metric,
        higher_is_better=scoring.higher_is_better,
        max_forgetting=scoring.max_forgetting,
        trials=tuple(
            record
            for record in records
            if record.control != "curve" and (record.control not in FOLLOW_UP_CONTROLS or record.trial_id in follow_ups.values())
        ),
        winner_id=promotion.trial_id,
        promotion_reason=promotion.reason,
        advice=((MORE_HOURS,) if ended_by_hours else ()) + promotion.advice,
        front=front,
        num_gangs=plan.num_gangs,
        ranks_per_gang=plan.execution.ranks,
        base_loads=sum(gang.base_loads for gang in figures),
        gangs_replaced=sum(gang.replaced for gang in figures),
        gang_idle_seconds=sum(sum(gang.idle_s) for gang in figures),
        first_trial_seconds=first_trial_seconds,
        wall_seconds=time.time() - started_at + (earlier.wall_seconds if earlier else 0.0),
        started_at=earlier.started_at if earlier else started_at,
        num_submissions=len(prepared.run.identity["submissions"]),
        gpu_hours_used=hours.used if hours is not None else 0.0,
        max_gpu_hours=prepared.spec.resources.max_gpu_hours,
        ended_by_hours=ended_by_hours,
        learning_curve=curve.curve,
        no_learning_curve=curve.missing,
        learning_curve_seconds=sum(record.seconds for record in records if record.trial_id in curve.trial_ids),
    )
    write_json(prepared.run.sweep, result)
    return result


def _decide(trials: Mapping[str, JudgedTrial], scoring: Scoring, seed: int) -> Promotion:
    """Decide which trial is promoted; if the metric is the loss, by paired differences to the base model on the eval set."""
    comparisons = _compare_with_base(trials, seed) if scoring.metric == "loss" else {}
    none = trials.get("none")
    return promote(
        [trial.record for trial in trials.values()],
        none.record if none is not None else None,
        scoring.max_forgetting,
        higher_is_better=scoring.higher_is_better,
        metric=scoring.metric,
        comparisons=comparisons,
    )


def _hours_sentence(
    plan: RunPlan,
    trials: Mapping[str, JudgedTrial],
    hours: HoursState | None,
    follow_ups: Mapping[str, str],
    points: Sequence[str],
) -> str:
    """Return what the bound on GPU-hours left untrained, in a sentence; empty if it stopped nothing.

    Args:
        follow_ups: The ids of the promoted trial's controls, by name.
        points: Ids of the trials of its learning curve.
    """
    if hours is None or not hours.spent or not isinstance(plan, SweepPlan):
        return ""
    ended = {trial_id for trial_id, trial in trials.items() if trial.entry.ended_for_good}
    done = sum(trials[trial_id].trial.control is None for trial_id in ended)
    asked = plan.search.num_trials
    if done < asked:
        return f"the search was ended after {done} of {asked} trials: {hours.spent}"
    controls = [name for name, trial_id in {"head": "head", **follow_ups}.items() if trial_id not in ended]
    missing = [f"the control {' and '.join(controls)}"] if controls else []
    missing += ["the learning curve"] if not ended.issuperset(points) else []
    if not missing:
        return ""
    return f"all {asked} trials were searched, but out of GPU-hours for {' and '.join(missing)}: {hours.spent}"


def _compare_with_base(trials: Mapping[str, JudgedTrial], seed: int) -> dict[str, Comparison]:
    """Compare every trial with the base model by its losses of the eval set's documents."""
    none = trials.get("none")
    base = none.losses if none is not None else None
    if base is None:
        return {}
    compared: dict[str, Comparison] = {}
    for trial_id, trial in trials.items():
        own = trial.losses if trial is not none else None
        if own is not None and np.isfinite(own[0]).all():
            compared[trial_id] = paired_comparison(own[0], base[0], base[1], seed, num_resamples=2000)
    return compared


def _first_trial_seconds(trials: Mapping[str, JudgedTrial], started_at: float) -> float | None:
    """Return the seconds from the submission to its first step of a searched trial; None where it made none."""
    searched = [trial.entry.results for trial in trials.values() if trial.trial.control is None]
    stretches = [
        (result, result.step - (results[index - 1].step if index else 0))
        for results in searched
        for index, result in enumerate(results)
        if result.started_at > started_at
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
