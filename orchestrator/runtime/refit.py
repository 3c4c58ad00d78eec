"""Training one trial to the full budget with Ray Train: fault-tolerant, on all the ranks that the plan gives it.

What is committed is decided by our own checkpoints (`train.find_latest`), not by `ray.train.report`, which is not
durable when it returns. A worker group that lost a rank starts again from the newest checkpoint that is whole; one in
which a rank ran out of memory, also one step down (`work.memory_ladder`), which its restarts do not count. A step down inside
a worker group is written down before it is taken: another group, or another submission, goes on by the same way.
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
from orchestrator.run.hours import affords_refit, is_left_for_refit, metered, read_hours, refit_hours, rung_hours
from orchestrator.run.layout import OWNER, RESULT, STARTS
from orchestrator.run.ledger import TrialEntry
from orchestrator.run.scoring import Scoring
from orchestrator.runtime.cluster import placement_strategy, rank_resources, worker_env
from orchestrator.runtime.failures import describe
from orchestrator.runtime.hang_detection import HangTimeouts
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.watchdog import Watchdog, send_heartbeats
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
"""What a worker group does: the one-trial job's evaluates the base first."""
REFIT_WORK: TypeAdapter[RefitWork] = TypeAdapter(Annotated[RefitWork, Field(discriminator="kind")])
LADDER = MemoryLadder(replaced="worker group")
MAX_RESTARTS = 3
MAX_FRUITLESS_STARTS = 10
"""How often a worker group is asked for where there is no place for it; each time Ray Train waits for a minute."""


def refit(
    base: BaseLoad, anatomy: ModelAnatomy, assignments: list[RefitWork], folder: Path, watchdog: Watchdog
) -> list[RungResult]:
    """Run assignments one after another in one worker group.

    Args:
        assignments: For instance the untouched base's evaluation, then the trial. All share one execution plan.
        folder: Where Ray Train keeps its own state.
        watchdog: Looks after the ranks.

    Returns:
        Rank 0's result of each assignment, also written as `result.json` beside each assignment's files.

    Raises:
        TrainingError: the worker group failed more than MAX_RESTARTS times, and not for want of memory.
    """
    for assignment in assignments:  # what failed by running out of memory is tried again by another submission
        known = _reduced_work(assignment)
        if known is not None and known.failure is not None:
            _reduced_work_file(assignment).unlink()
    while True:
        before = [_reduced_work(assignment) for assignment in assignments]
        # Ray writes its snapshot of a run in place; one that a killed driver left torn makes the folder unusable.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _trainer(base, anatomy, assignments, folder, watchdog.board).fit()
        except Exception as error:
            if [_reduced_work(assignment) for assignment in assignments] != before:
                continue  # smaller than before, so that this comes to an end
            raise TrainingError(
                f"the training on all ranks failed, after {MAX_RESTARTS} restarts at most: {_why(error, watchdog)}",
                where=str(folder.parent),
                remedy="submit the same spec again: it continues from the newest complete checkpoint",
            ) from error
        return [read_record(result_file(assignment), RungResult) for assignment in assignments]


def _why(error: Exception, watchdog: Watchdog) -> str:
    """In a line: what was said of a rank that hung, or the error of the rank that broke first."""
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
    """How often a refit in this folder was begun again, by its worker group or by another submission."""
    starts = folder / STARTS
    return max(0, len(starts.read_bytes().splitlines()) - 1) if starts.exists() else 0


def result_file(assignment: RefitWork) -> Path:
    return Path(assignment.folder) / RESULT


def _worker(payload: dict[str, Any]) -> None:
    """One rank of the refit. Ray Train has made the process group."""
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
    """Go on from the newest checkpoint, by the way that an earlier worker group came down to.

    Raises:
        RankOutOfMemoryError: memory ran out on this rank alone; how the next worker group goes on is written down.
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
        if ranks.first:  # in this order: a group killed in between begins as it was planned, and comes here again
            drop_later_checkpoints(folder, start)
            write_json(_reduced_work_file(assignment), now)

    try:
        result = host.run_trial(assignment.model_copy(update=update), on_reduced=on_reduced)
    except RankOutOfMemoryError as error:
        assert now.execution is not None
        write_json(_reduced_work_file(assignment), _step_down(now.execution, now.notes, error))
        raise
    if ranks.first and result.failed_for_memory:
        _reduced_work_file(assignment).unlink(missing_ok=True)  # another submission tries it as it is planned
    reduced = result.reduced_execution or (execution if execution != assignment.execution else None)
    return result.model_copy(update={"notes": (*notes, *result.notes), "reduced_execution": reduced})


def _step_down(execution: ExecutionPlan, notes: tuple[str, ...], error: RankOutOfMemoryError) -> ReducedWork:
    """Return how the next worker group continues after this one ran out of memory."""
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
"""Checkpoints of a refit between its first and its last step."""


def selection_of(prepared: Prepared, entry: TrialEntry) -> LayerSelection:
    """What learns in a trial, or in the control `head`."""
    plan = prepared.plan
    if entry.option is not None:
        return plan.options[entry.option].selection
    return head_control(plan, prepared.anatomy, prepared.spec, prepared.spec.train.seed)[1]


def full_budget(prepared: Prepared, entry: TrialEntry, base: RungResult | None, view: RunView) -> tuple[RungResult, RefitRecord]:
    """The result that is bundled: the trial's own rung where it had the full budget or stopped getting better, else the refit's.

    A refit that forgot more than the bound, where the rung that was promoted had not, is passed over for that rung.

    Args:
        base: What the untouched base scored.

    Raises:
        TrainingError: the refit failed.
    """
    trial, last = entry.trial, entry.results[-1]
    if not isinstance(prepared.plan, SweepPlan):
        return last, refit_record(prepared, last, "the job's one trial")
    judged = prepared.scoring.judged(entry.results, base)
    if not prepared.scoring.needs_refit(entry.results, trial.total_steps, base):
        best = f"the promoted trial was best on the eval set after {judged.step} of {trial.total_steps} steps"
        reason = best if judged.step < trial.total_steps else "the promoted trial had the full budget"
        return judged, RefitRecord(ran=False, reason=reason, to_step=judged.step)
    assignment = refit_assignment(prepared, trial, selection_of(prepared, entry), last.reduced_execution)
    left_out = _why_left_out(prepared, entry, base, assignment)
    if left_out:
        view.event("refit_left_out", left_out, trial_id=trial.trial_id)
        prepared.run.event("refit_left_out", message=left_out, trial_id=trial.trial_id)
        return judged, RefitRecord(ran=False, reason=left_out, to_step=judged.step, left_out_for_hours=True)
    view.phase("refit", f"{trial.total_steps} steps on {ranks_text(prepared.plan.refit_execution.ranks)}")
    result = run_refit(prepared, [assignment])[0]
    reason = f"the promoted trial had {last.step} of {trial.total_steps} steps"
    passed_over = why_passed_over(result, judged, base, prepared.scoring)
    if not passed_over:
        return result, refit_record(prepared, result, reason)
    view.event("refit_passed_over", passed_over, trial_id=trial.trial_id)
    prepared.run.event("refit_passed_over", message=passed_over, trial_id=trial.trial_id)
    return judged, refit_record(prepared, result, f"{reason}; {passed_over}")


def _why_left_out(prepared: Prepared, entry: TrialEntry, base: RungResult | None, assignment: RefitWork) -> str:
    """Why there is no refit, for want of GPU-hours; nothing where there is one, or one has come to its end before."""
    total, bound, folder = entry.trial.total_steps, prepared.spec.resources.max_gpu_hours, prepared.run.refit
    if bound is None:
        return ""
    _claim(folder, entry.trial.trial_id)
    if _stored_results([assignment]) is not None:
        return ""
    expected = refit_hours(entry.results, total)
    own = prepared.scoring.judged(entry.results, base)
    instead = f"the trial's own rung at step {own.step} is bundled instead"
    if not affords_refit(expected, bound):
        return f"the refit to {total} steps would take about {expected:.3g} of max_gpu_hours: {bound:g}; {instead}"
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    begun = max((int(step) for step in steps if step.isdigit()), default=0)
    to_come, used = expected * (1 - begun / total), read_hours(prepared.run.hours)
    slack = prepared.plan.num_gangs * rung_hours(entry.results)
    if is_left_for_refit(to_come, used, bound, slack):
        return ""
    return (
        f"the refit to {total} steps would take about {to_come:.3g} more, and {used:.3g} of max_gpu_hours: {bound:g} "
        f"are used; {instead}"
    )


def why_passed_over(refitted: RungResult, rung: RungResult, base: RungResult | None, scoring: Scoring) -> str:
    """Why a refit gives way to the rung that was promoted; nothing where it does not.

    Where that rung is beyond the bound too (a person promoted it), the refit is bundled, and the verdict tells it. With early
    stopping a refit that is worse on the eval set gives way too.
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
    """The whole training of a trial, in refit/, with checkpoints in between.

    Args:
        reduced: How the search trained it, where memory ran out there.
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
    """Run or go on with a refit; one of another trial is put aside, and found again when it is wanted.

    Raises:
        TrainingError: the training failed.
    """
    trial = assignments[-1].trial
    _claim(prepared.run.refit, trial.trial_id)
    results = _stored_results(assignments)
    if results is None:
        timeouts = HangTimeouts.from_environment().for_base(2 * prepared.anatomy.num_parameters())
        with metered(prepared.run.hours, assignments[0].execution.ranks), Watchdog(prepared.run, timeouts) as watchdog:
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
            if failed.failed_for_memory  # its reason says what would make room
            else "a lower learning rate usually helps; submit under another `name`",
        )
    return results


def _stored_results(assignments: list[RefitWork]) -> list[RungResult] | None:
    """What an earlier submission brought to its end; what failed in it is tried again."""
    files = [result_file(assignment) for assignment in assignments]
    if not all(file.exists() for file in files):
        return None
    results = [read_record(file, RungResult) for file in files]
    return results if all(result.state == "done" for result in results) else None


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
