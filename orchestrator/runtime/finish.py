"""Turn the promoted trial into the bundle and the verdict: refit, merge, verify, score on the test set, write the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from orchestrator.anatomy import LayerSelection
from orchestrator.errors import IntegrityError
from orchestrator.plan import follow_up_controls
from orchestrator.plan.values import SweepPlan
from orchestrator.run.activities import tell_bundling
from orchestrator.run.records import JudgedTrial, RunOutcome
from orchestrator.runtime.bundling import bundle_and_judge
from orchestrator.runtime.cluster import rank_resources, worker_env
from orchestrator.runtime.hang_detection import HangTimeouts
from orchestrator.runtime.outcome import plan_against_measured
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.refit import full_budget, selection_of
from orchestrator.runtime.watchdog import run_task, run_with_heartbeats, watched
from orchestrator.serve import BundleInputs
from orchestrator.store import check_artifact, versions
from orchestrator.store.folders import MANIFEST
from orchestrator.transfer import memory_rows
from orchestrator.transfer.records import RefitRecord, SweepResult, TransferReport
from orchestrator.transfer.run_view import RunView
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec


def finish(prepared: Prepared, sweep: SweepResult, trials: Mapping[str, JudgedTrial], view: RunView) -> RunOutcome:
    """Bundle the promoted trial and compute the verdict; where nothing was promoted, the report says why.

    Args:
        trials: The run's trials and controls as `judge_trials` returns them once nothing writes to the ledger any more.

    Raises:
        TrainingError: the refit failed.
        VerificationError: the bundle does not reproduce the trained model; it is left as `bundle.partial`.
    """
    refitted: RefitRecord | None = None
    if sweep.winner_id is None:
        transfer = TransferReport(sentence=f"nothing was promoted: {sweep.promotion_reason}", versions=versions())
    else:
        transfer = _bundle_promoted(prepared, trials[sweep.winner_id], trials, view)
        refitted = transfer.refit
    update = {"plan_against_measured": plan_against_measured(prepared, sweep, refitted), "memory": memory_rows(sweep.trials)}
    return RunOutcome(prepared.run.path, sweep, transfer.model_copy(update=update))


def _bundle_promoted(
    prepared: Prepared, promoted: JudgedTrial, trials: Mapping[str, JudgedTrial], view: RunView
) -> TransferReport:
    """Train the promoted trial to its full budget, then bundle it and judge it against the controls."""
    selection = selection_of(prepared, promoted.entry)
    bundled, refitted = full_budget(prepared, promoted, selection, view)
    figures = prepared.scoring.figures_of(bundled, promoted.base)
    controls = controls_beside(prepared, trials, promoted.trial, bundled.step)
    for message in controls.left_out:
        view.event("control_left_out", message)
        prepared.run.event("control_left_out", message=message)
    inputs = _inputs(prepared, promoted.trial, selection, bundled, controls)
    tell_bundling(prepared.run.path, "waiting for a free place")
    view.phase("merge", "then verify, then the test set")
    transfer = _bundle(prepared, inputs)
    return transfer.model_copy(
        update={
            "refit": refitted,
            "bundled": figures,
            "trial_id": promoted.trial.trial_id,
            "controls_left_out": controls.left_out,
        }
    )


@dataclass(frozen=True)
class Controls:
    """The trained controls that the bundle is compared with."""

    artifacts: dict[str, str]
    """Checkpoint by control."""
    left_out: tuple[str, ...] = ()
    """The reason for each requested control that is missing."""
    repeat_seeds: Mapping[str, int] = field(default_factory=dict[str, int])
    """The seed of each artifact that repeats the training from another seed."""
    failed_seeds: int = 0
    """Number of other seeds from which the same training failed."""


def controls_beside(prepared: Prepared, trials: Mapping[str, JudgedTrial], trial: TrialSpec, bundled_step: int) -> Controls:
    """Return `head` and the follow-up controls, trained for as many steps as the bundled artifact; the one-trial job has none.

    A control with another budget would not be comparable. With early stopping every seed counts at its best rung on the eval set,
    as the winner does.
    """
    if not isinstance(prepared.plan, SweepPlan):
        return Controls({})
    by_best_rung = prepared.plan.search.patience is not None
    artifacts, left_out, repeat_seeds, failed_seeds = dict[str, str](), list[str](), dict[str, int](), 0
    for name, trial_id in {"head": "head", **follow_up_controls(prepared.plan, trial.trial_id)}.items():
        if trial_id == trial.trial_id:
            continue
        control = trials.get(trial_id)
        entry = control.entry if control is not None else None
        if entry is not None and entry.end is not None and entry.end.state == "failed":
            left_out.append(f"{trial_id} failed: {entry.end.reason}")
            failed_seeds += entry.trial.control == "repeat"
        elif control is None or entry is None or not entry.results:
            left_out.append(f"{trial_id} was not trained")
        elif not entry.ended_for_good:
            left_out.append(f"{trial_id} was stopped by the GPU-hour bound after {entry.results[-1].step} steps")
        elif checkpoint := _checkpoint_beside(control, bundled_step, by_best_rung=by_best_rung):
            if damage := _damage(Path(checkpoint)):
                left_out.append(f"{trial_id} is damaged: {damage}")
            else:
                artifacts[name] = checkpoint
                if entry.trial.control == "repeat":
                    repeat_seeds[name] = entry.trial.seed
        else:
            left_out.append(f"{trial_id} was trained to {entry.results[-1].step} steps and what is bundled to {bundled_step}")
    return Controls(artifacts, tuple(left_out), repeat_seeds, failed_seeds)


def _damage(checkpoint: Path) -> str:
    """Return how a control's adapter or delta differs from its manifest; empty where it does not."""
    if not (checkpoint / MANIFEST).exists():
        return ""  # loading it reports what is missing
    try:
        check_artifact(checkpoint)
    except IntegrityError as error:
        return str(error).splitlines()[0]
    return ""


def _checkpoint_beside(control: JudgedTrial, bundled_step: int, *, by_best_rung: bool) -> str | None:
    """Return the checkpoint of the rung that is compared with the bundle; None where no rung has the same budget.

    Args:
        by_best_rung: With early stopping, other seeds are compared by their best rung, whatever its budget.
    """
    if control.trial.control == "head" or (control.trial.control == "repeat" and by_best_rung):
        assert control.compared is not None
        return control.compared.checkpoint
    return next((result.checkpoint for result in control.entry.results if result.step == bundled_step), None)


def _inputs(
    prepared: Prepared, trial: TrialSpec, selection: LayerSelection, bundled: RungResult, controls: Controls
) -> BundleInputs:
    assert bundled.checkpoint is not None
    folder, search = prepared.run.data, prepared.spec.search
    return BundleInputs(
        name=prepared.spec.name,
        base_name=prepared.spec.base.model,
        base=prepared.plan.base,
        base_sha256=prepared.plan.base_sha256,
        anatomy=prepared.anatomy,
        trial=trial,
        selection=selection,
        artifact=bundled.checkpoint,
        step=bundled.step,
        held_dtype=prepared.plan.execution.dtype,
        merge_into=prepared.spec.base.merge_into,
        extra_tensors=prepared.spec.base.extra_tensors,
        train_set=str(folder / "train.npz"),
        eval_set=str(folder / "eval.npz"),
        test_set=str(folder / "test.npz"),
        retain_set=prepared.data_paths.retain,
        controls=controls.artifacts,
        repeat_seeds=dict(controls.repeat_seeds),
        failed_seeds=controls.failed_seeds,
        shots=search.shots if search is not None and "k_shot" in search.controls else 0,
        separator=prepared.spec.data.separator,
        data_sha256=prepared.data.inputs_sha256,
        spec=prepared.spec.model_dump(mode="json"),
    )


def _bundle(prepared: Prepared, inputs: BundleInputs) -> TransferReport:
    """Merge, verify and score on a worker with one rank's resources: the driver may have neither the GPU nor the memory."""
    execution = prepared.plan.execution
    resources = rank_resources(execution)
    remote: Any = ray.remote(run_with_heartbeats)
    task = remote.options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        # `run_task` restarts the task itself, and reports why; Ray would do it silently.
        max_retries=0,
        runtime_env={"env_vars": worker_env(execution)},
    )
    scoring = prepared.scoring
    given = (inputs, str(prepared.run.bundle), scoring.metric, scoring.max_forgetting, prepared.spec.train.seed)
    # Merging sends no heartbeats, so only a stopped process counts as hung.
    with watched(prepared.run, HangTimeouts.from_environment(), 1, progress=False) as watchdog:
        return run_task(watchdog, "making the bundle", task, bundle_and_judge, *given)
