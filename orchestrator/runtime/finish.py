"""From the promoted trial to the bundle and the verdict: refit, merge, verify, the test set, the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from orchestrator.anatomy import LayerSelection
from orchestrator.errors import TrainingError
from orchestrator.plan import head_control, make_assignment, shuffled_control
from orchestrator.plan.values import Assignment, RungResult, TrialSpec
from orchestrator.runtime.bundling import bundle_and_judge
from orchestrator.runtime.cluster import fetch, rank_resources, worker_env
from orchestrator.runtime.ledger import Ledger, TrialEntry
from orchestrator.runtime.outcome import RunOutcome
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.refit import num_restarts, refit, result_file
from orchestrator.serve import BundleInputs
from orchestrator.store import read_json, versions, write_json
from orchestrator.transfer.records import (
    PlanAgainstMeasured,
    RefitRecord,
    RunView,
    SweepResult,
    TransferReport,
)

OWNER = "trial.json"
"""In refit/: whose it is."""
REFIT_CHECKPOINTS = 4
"""Checkpoints of a refit between its first and its last step."""


def finish(prepared: Prepared, sweep: SweepResult, view: RunView) -> RunOutcome:
    """Bundle the promoted trial and speak the verdict; where nothing was promoted, say so.

    Raises:
        TrainingError: the refit failed.
        VerificationError: the bundle does not reproduce the trained model; it stays `bundle.partial`.
    """
    measured = _plan_against_measured(prepared, sweep)
    if sweep.winner_id is None:
        transfer = TransferReport(
            sentence=f"nothing was promoted: {sweep.promotion_reason}", plan_against_measured=measured, versions=versions()
        )
        return RunOutcome(prepared.run.path, sweep, transfer)
    ledger = Ledger(prepared.run.trials)
    entry = ledger.get(sweep.winner_id)
    assert entry is not None
    trained, refitted = full_budget(prepared, entry, view)
    assert trained.checkpoint is not None
    view.phase("merge", "then verify, then the test set")
    transfer = _bundle(prepared, _inputs(prepared, ledger, entry, trained.checkpoint))
    transfer = transfer.model_copy(
        update={"refit": refitted, "plan_against_measured": measured, "trial_id": entry.trial.trial_id}
    )
    return RunOutcome(prepared.run.path, sweep, transfer)


def selection_of(prepared: Prepared, entry: TrialEntry) -> LayerSelection:
    """What learns in a trial, or in the control `head`."""
    plan = prepared.plan
    if entry.option is not None and plan.search is not None:
        return plan.search.options[entry.option].selection
    if entry.option is not None and plan.finetune is not None:
        return plan.finetune.selection
    return head_control(plan, prepared.anatomy, prepared.spec, prepared.spec.train.seed)[1]


def full_budget(prepared: Prepared, entry: TrialEntry, view: RunView) -> tuple[RungResult, RefitRecord]:
    """The trial's result at the full budget: its own last rung, or the refit's.

    Raises:
        TrainingError: the refit failed.
    """
    trial, last = entry.trial, entry.results[-1]
    if prepared.plan.search is None:
        return last, refit_record(prepared, last, "the job's one trial")
    if last.step >= trial.total_steps:
        return last, RefitRecord(ran=False, reason="the promoted trial had the full budget", to_step=last.step)
    view.phase("refit", f"{trial.total_steps} steps on {prepared.plan.refit_execution.ranks} rank(s)")
    assignment = refit_assignment(prepared, trial, selection_of(prepared, entry))
    result = run_refit(prepared, [assignment])[0]
    return result, refit_record(prepared, result, f"the promoted trial had {last.step} of {trial.total_steps} steps")


def refit_assignment(prepared: Prepared, trial: TrialSpec, selection: LayerSelection) -> Assignment:
    """The whole training of a trial, in refit/, with checkpoints in between."""
    return make_assignment(
        prepared.plan,
        trial,
        selection,
        settings=prepared.settings,
        data=prepared.data_paths,
        metric=prepared.scoring.metric,
        folder=str(prepared.run.refit),
        rung=0,
        start=None,
        stop_step=trial.total_steps,
        execution=prepared.plan.refit_execution,
        keep_optimizer=False,
        checkpoint_every_steps=max(1, trial.total_steps // (REFIT_CHECKPOINTS + 1)),
    )


def run_refit(prepared: Prepared, assignments: list[Assignment]) -> list[RungResult]:
    """Run or go on with a refit; one of another trial is put aside, and found again when it is wanted.

    Raises:
        TrainingError: the training failed.
    """
    trial = assignments[-1].trial
    _claim(prepared.run.refit, trial.trial_id)
    if result_file(assignments[-1]).exists():
        results = [RungResult.model_validate(read_json(result_file(assignment))) for assignment in assignments]
    else:
        results = refit(prepared.plan.base, prepared.anatomy, assignments, prepared.run.path / "ray-train")
        for note in (note for result in results for note in result.notes):
            prepared.run.event("trial_note", message=f"{trial.trial_id}: {note}", trial_id=trial.trial_id)
        if num_restarts(prepared.run.refit):
            prepared.run.event("refit_restarted", message=f"{num_restarts(prepared.run.refit)} times", trial_id=trial.trial_id)
    failed = next((result for result in results if result.state == "failed"), None)
    if failed is not None:
        raise TrainingError(
            f"trial {failed.trial_id} failed: {failed.reason}",
            where=str(prepared.run.refit),
            remedy="a lower learning rate is the usual cure; submit under another `name`",
        )
    return results


def _claim(folder: Path, trial_id: str) -> None:
    """Have the refit's folder belong to this trial, so that no trial goes on from another's checkpoint."""
    owner_file = folder / OWNER
    owner = read_json(owner_file)["trial_id"] if owner_file.exists() else None
    if owner == trial_id:
        return
    if folder.exists() and owner is not None:
        folder.rename(folder.with_name(f"{folder.name}-{owner}"))
    earlier = folder.with_name(f"{folder.name}-{trial_id}")
    if earlier.exists():
        earlier.rename(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(owner_file, {"trial_id": trial_id})


def refit_record(prepared: Prepared, result: RungResult, reason: str) -> RefitRecord:
    engine = result.engine
    return RefitRecord(
        ran=True,
        reason=reason,
        to_step=result.step,
        seconds=result.train_seconds + result.eval_seconds,
        restarts=num_restarts(prepared.run.refit),
        executor=engine.executor if engine else "",
        zero_stage=engine.zero_stage if engine else 0,
        ranks=engine.ranks if engine else 1,
    )


def _inputs(prepared: Prepared, ledger: Ledger, entry: TrialEntry, artifact: str) -> BundleInputs:
    ids = {"head": "head", "shuffled": shuffled_control(entry.trial).trial_id}
    controls = {name: _artifact_of(ledger, trial_id) for name, trial_id in ids.items() if trial_id != entry.trial.trial_id}
    folder = prepared.run.data
    return BundleInputs(
        name=prepared.spec.name,
        base_name=prepared.spec.base.model,
        base=prepared.plan.base,
        anatomy=prepared.anatomy,
        trial=entry.trial,
        selection=selection_of(prepared, entry),
        artifact=artifact,
        held_dtype=prepared.plan.execution.dtype,
        merge_into=prepared.spec.base.merge_into,
        train_set=str(folder / "train.npz"),
        eval_set=str(folder / "eval.npz"),
        test_set=str(folder / "test.npz"),
        retain_set=prepared.data_paths.retain,
        controls={name: artifact for name, artifact in controls.items() if artifact is not None},
        separator=prepared.spec.data.separator,
        data_sha256=prepared.data.inputs_sha256,
        spec=prepared.spec.model_dump(mode="json"),
    )


def _artifact_of(ledger: Ledger, trial_id: str) -> str | None:
    entry = ledger.get(trial_id)
    done = [result for result in entry.results if result.state == "done"] if entry is not None else []
    return done[-1].checkpoint if done else None


def _bundle(prepared: Prepared, inputs: BundleInputs) -> TransferReport:
    """On a worker, with one rank's resources: the driver may have neither GPU nor memory for it."""
    execution = prepared.plan.execution
    resources = rank_resources(execution)
    remote: Any = ray.remote(bundle_and_judge)
    task = remote.options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        max_retries=0,
        runtime_env={"env_vars": worker_env(execution)},
    )
    scoring = prepared.scoring
    call = task.remote(inputs, str(prepared.run.bundle), scoring.metric, scoring.max_forgetting, prepared.spec.train.seed)
    return fetch(call)


def _plan_against_measured(prepared: Prepared, sweep: SweepResult) -> tuple[PlanAgainstMeasured, ...]:
    """What the plan said beside what the run measured."""
    plan = prepared.plan
    options = plan.search.options if plan.search is not None else (plan.finetune,) if plan.finetune is not None else ()
    planned = max((option.memory.total_bytes for option in options if option is not None), default=None)
    peaks = [trial.engine.peak_memory_bytes for trial in sweep.trials if trial.engine is not None]
    folder = sum(file.stat().st_size for file in Path(prepared.run.path).rglob("*") if file.is_file())
    loads = float(sweep.base_loads) if plan.search is not None else None
    return (
        PlanAgainstMeasured(name="peak memory of a rank", planned=planned, measured=max(peaks, default=None), unit="bytes"),
        PlanAgainstMeasured(name="disk, before the bundle", planned=plan.disk_bytes, measured=folder, unit="bytes"),
        PlanAgainstMeasured(name="base loads in the search", planned=float(plan.num_gangs), measured=loads, unit="count"),
    )
