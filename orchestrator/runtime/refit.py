"""Train one trial to the full budget with Ray Train: fault-tolerant, on all the ranks that the plan gives it.

Progress is committed by our own checkpoints (`train.find_own`), not by `ray.train.report`, which is not durable when it returns.
After losing a rank, the worker group restarts from the newest complete checkpoint. After a rank ran out of memory, it restarts
with the next smaller execution (`work.memory_ladder`), which does not count towards the limit on restarts. A smaller execution is
recorded on disk before it is used, so that the next worker group or submission continues with it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.anatomy import LayerSelection, ModelAnatomy
from orchestrator.errors import RankOutOfMemoryError, TrainingError
from orchestrator.plan import head_control, train_rung
from orchestrator.plan.values import SweepPlan
from orchestrator.run.activities import ranks_text
from orchestrator.run.hours import read_hours, why_no_refit
from orchestrator.run.layout import OWNER, RESULT, STARTS
from orchestrator.run.ledger import TrialEntry
from orchestrator.run.records import JudgedTrial
from orchestrator.run.scoring import Scoring
from orchestrator.runtime.cluster import placement_strategy, rank_resources, worker_env
from orchestrator.runtime.failures import describe
from orchestrator.runtime.hang_detection import HangTimeouts
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.watchdog import Watchdog, send_heartbeats, watched
from orchestrator.store import read_json, read_record, write_json
from orchestrator.train import TrainHost, drop_later_checkpoints, find_own
from orchestrator.transfer.records import RefitRecord
from orchestrator.transfer.run_view import RunView
from orchestrator.work.assignment import EvaluateBase, TrainRung, owner_of
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.memory_ladder import REDUCED_WORK, MemoryLadder, ReducedWork, no_larger_than
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

RefitWork = TrainRung | EvaluateBase
"""Work of a worker group: that of the one-trial job also evaluates the base model, first."""
REFIT_WORK: TypeAdapter[RefitWork] = TypeAdapter(Annotated[RefitWork, Field(discriminator="kind")])
LADDER = MemoryLadder(replaced="worker group")
MAX_RESTARTS = 3
MAX_FRUITLESS_STARTS = 10
"""Maximum number of attempts to place a worker group that does not fit; Ray Train waits a minute for each."""


def refit(
    base: BaseLoad, anatomy: ModelAnatomy, assignments: list[RefitWork], folder: Path, watchdog: Watchdog
) -> list[RungResult]:
    """Run assignments one after another in one worker group.

    Args:
        assignments: For instance the evaluation of the base model, then the trial. All share one execution plan.
        folder: Folder for Ray Train's own state.
        watchdog: Detects ranks that hang.

    Returns:
        Rank 0's result of each assignment, also written as `result.json` into the assignment's folder.

    Raises:
        TrainingError: the worker group failed more than MAX_RESTARTS times, not counting restarts after running out of memory.
    """
    for assignment in assignments:  # a new submission retries what failed by running out of memory
        known = _reduced_work(assignment)
        if known is not None and known.failure is not None:
            _reduced_work_file(assignment).unlink()
    while True:
        before = [_reduced_work(assignment) for assignment in assignments]
        # Ray writes its snapshot of a run in place: a killed driver may leave it truncated, and the folder unusable.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _trainer(base, anatomy, assignments, folder, watchdog.board).fit()
        except Exception as error:
            if [_reduced_work(assignment) for assignment in assignments] != before:
                continue  # every retry uses a smaller execution, so the loop ends
            raise TrainingError(
                f"the training on all ranks failed, after {MAX_RESTARTS} restarts at most: {_why(error, watchdog)}",
                where=str(folder.parent),
                remedy="submit the same spec again: it continues from the newest complete checkpoint",
            ) from error
        return [read_record(result_file(assignment), RungResult) for assignment in assignments]


def _why(error: Exception, watchdog: Watchdog) -> str:
    """Return one line: the message about a rank that hung, or the error of the rank that failed first."""
    if watchdog.messages:
        return watchdog.messages[-1]
    first = next(iter(getattr(error, "worker_failures", {}).values()), error)
    return describe(getattr(first, "cause", None) or first)


def _trainer(base: BaseLoad, anatomy: ModelAnatomy, assignments: list[RefitWork], folder: Path, board: Any) -> TorchTrainer:
    execution = assignments[0].execution
    payload = {
        "base": base.model_dump(mode="json"),
        "anatomy": anatomy.model_dump(mode="json"),
        "assignments": [assignment.model_dump(mode="json") for assignment in assignments],
        "board": board,
    }
    return TorchTrainer(
        _worker,
        train_loop_config=payload,
        torch_config=TorchConfig(backend=execution.backend),
        scaling_config=train.ScalingConfig(
            num_workers=execution.ranks,
            use_gpu=execution.device == "cuda",
            resources_per_worker=rank_resources(execution),
            placement_strategy=placement_strategy(execution),
        ),
        run_config=train.RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=train.FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=MAX_FRUITLESS_STARTS),
            worker_runtime_env={"env_vars": worker_env(execution)},
        ),
    )


def num_restarts(folder: Path) -> int:
    """Return how many times the refit in this folder was restarted, by its worker group or by another submission."""
    starts = folder / STARTS
    return max(0, len(starts.read_bytes().splitlines()) - 1) if starts.exists() else 0


def result_file(assignment: RefitWork) -> Path:
    return Path(assignment.folder) / RESULT


def _worker(payload: dict[str, Any]) -> None:
    """Run one rank of the refit. Ray Train has already created the process group."""
    base, anatomy = BaseLoad.model_validate(payload["base"]), ModelAnatomy.model_validate(payload["anatomy"])
    assignments = [REFIT_WORK.validate_python(values) for values in payload["assignments"]]
    context = train.get_context()
    rank = context.get_world_rank()
    send_heartbeats(payload["board"], rank)
    host = TrainHost.create(base, anatomy, assignments[0].execution, rank, context.get_world_size(), init_method=None)
    if rank == 0:
        _note_start(Path(assignments[-1].folder), os.getpid())
    try:
        for assignment in assignments:
            result = _run(host, assignment)
            if rank == 0:
                write_json(result_file(assignment), result)
            train.report({"trial_id": result.trial_id, "step": result.step, "state": result.state})
    finally:
        host.close()


def _run(host: TrainHost, assignment: RefitWork) -> RungResult:
    """Continue from the newest checkpoint, with the reduced execution that an earlier worker group recorded, if any.

    Raises:
        RankOutOfMemoryError: memory ran out on this rank only; the execution of the next worker group is recorded on disk.
    """
    ranks, folder = host.ranks, Path(assignment.folder)
    found = (find_own(folder, owner_of(assignment)), _reduced_work(assignment)) if ranks.first else None
    (newest, told), known = ranks.broadcast(found)
    notes = (*(known.notes if known is not None else ()), *told)
    if known is not None and known.failure is not None:
        return assignment.failed(known.failure).model_copy(update={"notes": notes})
    execution = no_larger_than(assignment.execution, known.execution if known is not None else None)
    update: dict[str, Any] = {"execution": execution}
    start: Path | None = None
    if isinstance(assignment, TrainRung):
        start = newest or (Path(assignment.start) if assignment.start else None)
        update["start"] = str(start) if start else None
    now = ReducedWork(execution=execution, notes=notes)

    def on_reduced(smaller: ExecutionPlan, note: str) -> None:
        nonlocal now
        now = ReducedWork(execution=smaller, notes=(*now.notes, note), reason=note)
        if ranks.first:  # in this order: a group killed in between starts as planned and gets here again
            drop_later_checkpoints(folder, start)
            write_json(_reduced_work_file(assignment), now)

    try:
        result = host.run_trial(assignment.model_copy(update=update), on_reduced=on_reduced)
    except RankOutOfMemoryError as error:
        assert now.execution is not None
        write_json(_reduced_work_file(assignment), _step_down(now.execution, now.notes, error))
        raise
    if ranks.first and result.failed_for_memory:
        _reduced_work_file(assignment).unlink(missing_ok=True)  # another submission retries it with the planned execution
    reduced = result.reduced_execution or (execution if execution != assignment.execution else None)
    return result.model_copy(update={"notes": (*notes, *result.notes), "reduced_execution": reduced})


def _step_down(execution: ExecutionPlan, notes: tuple[str, ...], error: RankOutOfMemoryError) -> ReducedWork:
    """Return the execution of the next worker group after this one ran out of memory, or the failure if none is smaller."""
    smaller = LADDER.step(execution, error.what)
    if isinstance(smaller, Failure):
        return ReducedWork(execution=None, notes=notes, reason=str(smaller), failure=smaller)
    return ReducedWork(execution=smaller.execution, notes=(*notes, smaller.note), reason=error.what)


def _reduced_work(assignment: RefitWork) -> ReducedWork | None:
    file = _reduced_work_file(assignment)
    return read_record(file, ReducedWork) if file.exists() else None


def _reduced_work_file(assignment: RefitWork) -> Path:
    return Path(assignment.folder) / REDUCED_WORK


def _note_start(folder: Path, pid: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STARTS).open("a") as file:
        file.write(f"{pid}\n")


REFIT_CHECKPOINTS = 4
"""Number of checkpoints of a refit between its first and its last step."""


def selection_of(prepared: Prepared, entry: TrialEntry) -> LayerSelection:
    """Return the trainable parameters of a trial, or of the control `head`."""
    plan = prepared.plan
    if entry.option is not None:
        return plan.options[entry.option].selection
    return head_control(plan, prepared.anatomy, prepared.spec, prepared.spec.train.seed)[1]


def full_budget(
    prepared: Prepared, promoted: JudgedTrial, selection: LayerSelection, view: RunView
) -> tuple[RungResult, RefitRecord]:
    """Return the result that is bundled: the trial's own rung if it had the full budget or stopped improving, else the refit's.

    If the refit forgot more than the bound and the promoted rung did not, the promoted rung is bundled instead.

    Args:
        selection: The trainable parameters of the promoted trial.

    Raises:
        TrainingError: the refit failed.
    """
    trial, last, own = promoted.trial, promoted.entry.results[-1], promoted.compared
    assert own is not None
    if not isinstance(prepared.plan, SweepPlan):
        return last, refit_record(prepared, last, "the job's one trial")
    if not promoted.needs_refit:
        best = f"the promoted trial was best on the eval set after {own.step} of {trial.total_steps} steps"
        reason = best if own.step < trial.total_steps else "the promoted trial had the full budget"
        return own, RefitRecord(ran=False, reason=reason, to_step=own.step)
    assignment = refit_assignment(prepared, trial, selection, last.reduced_execution)
    _claim(prepared.run.refit, trial.trial_id)
    left_out = _why_left_out(prepared, promoted, assignment)
    if left_out:
        left_out = f"{left_out}; the trial's own rung at step {own.step} is bundled instead"
        view.event("refit_left_out", left_out, trial_id=trial.trial_id)
        prepared.run.event("refit_left_out", message=left_out, trial_id=trial.trial_id)
        return own, RefitRecord(ran=False, reason=left_out, to_step=own.step, left_out_for_hours=True)
    view.phase("refit", f"{trial.total_steps} steps on {ranks_text(prepared.plan.refit_execution.ranks)}")
    result = run_refit(prepared, [assignment])[0]
    record = refit_record(prepared, result, f"the promoted trial had {last.step} of {trial.total_steps} steps")
    passed_over = why_passed_over(result, own, promoted.base, prepared.scoring)
    if not passed_over:
        return result, record
    view.event("refit_passed_over", passed_over, trial_id=trial.trial_id)
    prepared.run.event("refit_passed_over", message=passed_over, trial_id=trial.trial_id)
    return own, record.model_copy(update={"reason": f"{record.reason}; {passed_over}"})


def _why_left_out(prepared: Prepared, promoted: JudgedTrial, assignment: RefitWork) -> str:
    """Return why the GPU-hours do not allow the refit, whose folder is claimed; empty where they do or it is already done."""
    folder = prepared.run.refit
    if _stored_results([assignment]) is not None:
        return ""
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    begun = max((int(step) for step in steps if step.isdigit()), default=0)
    return why_no_refit(
        promoted.entry.results,
        promoted.trial.total_steps,
        begun,
        used_hours=read_hours(prepared.run.hours),
        max_hours=prepared.spec.resources.max_gpu_hours,
        num_gangs=prepared.plan.num_gangs,
    )


def why_passed_over(refitted: RungResult, rung: RungResult, base: RungResult | None, scoring: Scoring) -> str:
    """Return why the promoted rung is bundled instead of the refit; empty if the refit is bundled.

    If that rung exceeds the bound on forgetting too (a person promoted it), the refit is bundled and the verdict reports it. With
    early stopping, the rung is also bundled if the refit is worse on the eval set.
    """
    lost, before = scoring.forgetting_of(refitted, base), scoring.forgetting_of(rung, base)
    bound = scoring.max_forgetting
    instead = f"the trial's own rung at step {rung.step}"
    if lost is None or before is None or lost <= bound or before > bound:
        if scoring.patience is None or scoring.score(refitted, base) <= scoring.score(rung, base):
            return ""
        worse, better = scoring.metric_of(refitted), scoring.metric_of(rung)
        figures = "" if worse is None or better is None else f" ({scoring.metric} {worse:.4g} against {better:.4g})"
        return f"the refit to {refitted.step} steps is worse on the eval set than {instead}{figures}, which is bundled instead"
    return (
        f"the refit to {refitted.step} steps forgot {lost:+.3f} nats per token, more than the bound of {bound:g}; "
        f"{instead}, at {before:+.3f}, is bundled instead"
    )


def refit_assignment(
    prepared: Prepared, trial: TrialSpec, selection: LayerSelection, reduced: ExecutionPlan | None = None
) -> TrainRung:
    """Return the assignment that trains a trial to the full budget in refit/, with checkpoints in between.

    Args:
        reduced: The reduced execution of the trial in the search, if it ran out of memory there.
    """
    execution = prepared.plan.refit_execution
    return train_rung(
        prepared.plan,
        prepared.work_context(execution),
        trial,
        selection,
        execution=no_larger_than(execution, reduced),
        folder=str(prepared.run.refit),
        stop_step=trial.total_steps,
        keep_optimizer=False,
        checkpoint_every_steps=max(1, trial.total_steps // (REFIT_CHECKPOINTS + 1)),
    )


def run_refit(prepared: Prepared, assignments: list[RefitWork]) -> list[RungResult]:
    """Run or continue a refit. The refit of another trial is moved aside, and reused if that trial is refitted again.

    Raises:
        TrainingError: the training failed.
    """
    trial = assignments[-1].trial
    _claim(prepared.run.refit, trial.trial_id)
    results = _stored_results(assignments)
    if results is None:
        timeouts = HangTimeouts.from_environment().for_base(2 * prepared.anatomy.num_parameters())
        with watched(prepared.run, timeouts, assignments[0].execution.ranks) as watchdog:
            results = refit(prepared.plan.base, prepared.anatomy, assignments, prepared.run.path / "ray-train", watchdog)
        for note in (note for result in results for note in result.notes):
            prepared.run.event("trial_note", message=f"{trial.trial_id}: {note}", trial_id=trial.trial_id)
        if num_restarts(prepared.run.refit):
            prepared.run.event("refit_restarted", message=f"{num_restarts(prepared.run.refit)} times", trial_id=trial.trial_id)
    failed = next((result for result in results if result.state == "failed"), None)
    if failed is not None:
        raise TrainingError(
            f"trial {failed.trial_id} failed: {failed.reason}",
            where=str(prepared.run.refit),
            remedy=""
            if failed.failed_for_memory  # its reason already includes a remedy
            else "a lower learning rate usually helps; submit under another `name`",
        )
    return results


def _stored_results(assignments: list[RefitWork]) -> list[RungResult] | None:
    """Return the results of an earlier submission; None if any is missing or failed, so that all are run again."""
    files = [result_file(assignment) for assignment in assignments]
    if not all(file.exists() for file in files):
        return None
    results = [read_record(file, RungResult) for file in files]
    return results if all(result.state == "done" for result in results) else None


def _claim(folder: Path, trial_id: str) -> None:
    """Make this trial the owner of the refit's folder, so that it never resumes from the checkpoint of another one."""
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
