"""Turn the promoted trial into the bundle and the verdict: refit, merge, verify, score on the test set, write the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from orchestrator.errors import IntegrityError
from orchestrator.plan import follow_up_controls
from orchestrator.plan.values import SweepPlan
from orchestrator.run.activities import tell_bundling
from orchestrator.run.hours import metered
from orchestrator.run.ledger import Ledger, TrialEntry, base_result
from orchestrator.run.records import RunOutcome
from orchestrator.run.scoring import Scoring
from orchestrator.runtime.bundling import bundle_and_judge
from orchestrator.runtime.cluster import rank_resources, worker_env
from orchestrator.runtime.hang_detection import HangTimeouts
from orchestrator.runtime.outcome import plan_against_measured
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.refit import full_budget, selection_of
from orchestrator.runtime.watchdog import Watchdog, run_task, run_with_heartbeats
from orchestrator.serve import BundleInputs
from orchestrator.store import check_artifact, versions
from orchestrator.store.folders import MANIFEST
from orchestrator.transfer import memory_rows
from orchestrator.transfer.records import BundledFigures, RefitRecord, SweepResult, TransferReport
from orchestrator.transfer.run_view import RunView
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec


def finish(prepared: Prepared, sweep: SweepResult, view: RunView) -> RunOutcome:
    """Bundle the promoted trial and compute the verdict; where nothing was promoted, the report says why.

    Raises:
        TrainingError: the refit failed.
        VerificationError: the bundle does not reproduce the trained model; it is left as `bundle.partial`.
    """
    refitted: RefitRecord | None = None
    if sweep.winner_id is None:
        transfer = TransferReport(sentence=f"nothing was promoted: {sweep.promotion_reason}", versions=versions())
    else:
        transfer = _bundle_promoted(prepared, sweep.winner_id, view)
        refitted = transfer.refit
    update = {"plan_against_measured": plan_against_measured(prepared, sweep, refitted), "memory": memory_rows(sweep.trials)}
    return RunOutcome(prepared.run.path, sweep, transfer.model_copy(update=update))


def _bundle_promoted(prepared: Prepared, trial_id: str, view: RunView) -> TransferReport:
    """Train the promoted trial to its full budget, and bundle and judge it beside the controls."""
    ledger = prepared.run.ledger
    ledger.refresh()  # the exchange may have written until it was closed
    entry = ledger.get(trial_id)
    assert entry is not None
    base = base_result(ledger)
    bundled, refitted = full_budget(prepared, entry, base, view)
    controls = controls_beside(prepared, ledger, entry.trial, bundled.step)
    for message in controls.left_out:
        view.event("control_left_out", message)
        prepared.run.event("control_left_out", message=message)
    tell_bundling(prepared.run.path, "waiting for a free place")
    view.phase("merge", "then verify, then the test set")
    transfer = _bundle(prepared, _inputs(prepared, entry, bundled, controls))
    return transfer.model_copy(
        update={
            "refit": refitted,
            "bundled": bundled_figures(bundled, prepared.scoring, base),
            "trial_id": entry.trial.trial_id,
            "controls_left_out": controls.left_out,
        }
    )


def bundled_figures(result: RungResult, scoring: Scoring, base: RungResult | None) -> BundledFigures:
    """Return the measured figures of the bundled artifact."""
    return BundledFigures(
        step=result.step,
        metric=scoring.metric_of(result),
        retain_loss=result.retain_loss,
        forgetting=scoring.forgetting_of(result, base),
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


def controls_beside(prepared: Prepared, ledger: Ledger, trial: TrialSpec, bundled_step: int) -> Controls:
    """Return `head` and the follow-up controls, trained for as many steps as the bundled artifact; the one-trial job has none.

    A control with another budget would not be comparable. With early stopping every seed counts at its best rung on the eval set,
    as the winner does.
    """
    if not isinstance(prepared.plan, SweepPlan):
        return Controls({})
    artifacts, left_out, repeat_seeds, failed_seeds = dict[str, str](), list[str](), dict[str, int](), 0
    for name, trial_id in {"head": "head", **follow_up_controls(prepared.plan, trial.trial_id)}.items():
        if trial_id == trial.trial_id:
            continue
        entry = ledger.get(trial_id)
        if entry is not None and entry.end is not None and entry.end.state == "failed":
            left_out.append(f"{trial_id} failed: {entry.end.reason}")
            failed_seeds += entry.trial.control == "repeat"
        elif entry is None or not entry.results:
            left_out.append(f"{trial_id} was not trained")
        elif not entry.ended_for_good:
            left_out.append(f"{trial_id} was stopped by the GPU-hour bound after {entry.results[-1].step} steps")
        elif checkpoint := _checkpoint_beside(prepared, ledger, entry, bundled_step):
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


def _checkpoint_beside(prepared: Prepared, ledger: Ledger, entry: TrialEntry, bundled_step: int) -> str | None:
    """Return the checkpoint of the rung that is compared with the bundle; None where no rung has the same budget."""
    scoring, control = prepared.scoring, entry.trial.control
    if control == "head" or (control == "repeat" and scoring.patience is not None):
        return scoring.judged(entry.results, base_result(ledger)).checkpoint
    return next((result.checkpoint for result in entry.results if result.step == bundled_step), None)


def _inputs(prepared: Prepared, entry: TrialEntry, bundled: RungResult, controls: Controls) -> BundleInputs:
    assert bundled.checkpoint is not None
    folder, search = prepared.run.data, prepared.spec.search
    return BundleInputs(
        name=prepared.spec.name,
        base_name=prepared.spec.base.model,
        base=prepared.plan.base,
        base_sha256=prepared.plan.base_sha256,
        anatomy=prepared.anatomy,
        trial=entry.trial,
        selection=selection_of(prepared, entry),
        artifact=bundled.checkpoint,
        step=bundled.step,
        held_dtype=prepared.plan.execution.dtype,
        merge_into=prepared.spec.base.merge_into,
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
    with metered(prepared.run.hours, 1), Watchdog(prepared.run, HangTimeouts.from_environment(), progress=False) as watchdog:
        return run_task(watchdog, "making the bundle", task, bundle_and_judge, *given)
