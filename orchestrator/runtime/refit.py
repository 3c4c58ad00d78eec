"""Training one trial to the full budget with Ray Train: fault-tolerant, on all the ranks that the plan gives it.

What is committed is decided by our own checkpoints (`train.find_latest`), not by `ray.train.report`, which is not
durable when it returns. A worker group that lost a rank starts again from the newest checkpoint that is whole; one in
which a rank ran out of memory, also one step down (`plan.relief`), which its restarts do not count. A step down inside
a worker group is written down before it is taken: another group, or another submission, goes on by the same way.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import RankOutOfMemoryError, TrainingError
from orchestrator.plan.ownership import owner_of
from orchestrator.plan.relief import fits_in_no_way, nothing_smaller, relieve, with_relief
from orchestrator.plan.results import RungResult
from orchestrator.plan.values import Assignment, BaseLoad, ExecutionPlan
from orchestrator.runtime.activities import STARTS
from orchestrator.runtime.assignments import failed_result
from orchestrator.runtime.cluster import placement_strategy, rank_resources, worker_env
from orchestrator.runtime.minding import Minder, send_pulses
from orchestrator.runtime.mishaps import describe
from orchestrator.store import read_record, write_json
from orchestrator.values import Value

if TYPE_CHECKING:
    from orchestrator.train import TrainHost

MAX_RESTARTS = 3
MAX_FRUITLESS_STARTS = 10
"""How often a worker group is asked for where there is no place for it; each time Ray Train waits for a minute."""
STEPPED_DOWN = "stepped-down.json"
"""Beside an assignment's files: how it goes on after a worker group ran out of memory."""


class SteppedDown(Value):
    """How an assignment that ran out of memory goes on, also in a worker group after the one that found out."""

    execution: ExecutionPlan | None
    """The next smaller way; None where there is none left."""
    notes: tuple[str, ...]
    reason: str
    """What was said of it."""


def refit(base: BaseLoad, anatomy: ModelAnatomy, assignments: list[Assignment], folder: Path, minder: Minder) -> list[RungResult]:
    """Run assignments one after another in one worker group.

    Args:
        assignments: For instance the untouched base's evaluation, then the trial. All share one execution plan.
        folder: Where Ray Train keeps its own state.
        minder: Looks after the ranks.

    Returns:
        Rank 0's result of each assignment, also written as `result.json` beside each assignment's files.

    Raises:
        TrainingError: the worker group failed more than MAX_RESTARTS times, and not for want of memory.
    """
    for assignment in assignments:  # what fitted in no way is tried again by another submission
        known = _stepped_down(assignment)
        if known is not None and known.execution is None:
            _stepped_down_file(assignment).unlink()
    while True:
        before = [_stepped_down(assignment) for assignment in assignments]
        # Ray writes its snapshot of a run in place; one that a killed driver left torn makes the folder unusable.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _trainer(base, anatomy, assignments, folder, minder.board).fit()
        except Exception as error:
            if [_stepped_down(assignment) for assignment in assignments] != before:
                continue  # smaller than before, so that this comes to an end
            raise TrainingError(
                f"the training on all ranks failed, after {MAX_RESTARTS} restarts at most: {_why(error, minder)}",
                where=str(folder.parent),
                remedy="submit the same spec again: it continues from the newest complete checkpoint",
            ) from error
        return [read_record(result_file(assignment), RungResult) for assignment in assignments]


def _why(error: Exception, minder: Minder) -> str:
    """In a line: what was said of a rank that hung, or the error of the rank that broke first."""
    if minder.said:
        return minder.said[-1]
    first = next(iter(getattr(error, "worker_failures", {}).values()), error)
    return describe(getattr(first, "cause", None) or first)


def _trainer(base: BaseLoad, anatomy: ModelAnatomy, assignments: list[Assignment], folder: Path, board: Any) -> TorchTrainer:
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


def result_file(assignment: Assignment) -> Path:
    return Path(assignment.folder) / "result.json"


def _worker(payload: dict[str, Any]) -> None:
    """One rank of the refit. Ray Train has made the process group."""
    from orchestrator.train import TrainHost

    base, anatomy = BaseLoad.model_validate(payload["base"]), ModelAnatomy.model_validate(payload["anatomy"])
    assignments = [Assignment.model_validate(values) for values in payload["assignments"]]
    context = train.get_context()
    rank = context.get_world_rank()
    send_pulses(payload["board"], rank)
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


def _run(host: TrainHost, assignment: Assignment) -> RungResult:
    """Go on from the newest checkpoint, by the way that an earlier worker group came down to.

    Raises:
        RankOutOfMemoryError: memory ran out on this rank alone; how the next worker group goes on is written down.
    """
    from orchestrator.train import drop_later_checkpoints, find_own

    ranks, folder = host.ranks, Path(assignment.folder)
    found = (find_own(folder, owner_of(assignment)), _stepped_down(assignment)) if ranks.first else None
    (newest, told), known = ranks.broadcast(found)
    notes = (*(known.notes if known is not None else ()), *told)
    if known is not None and known.execution is None:
        return failed_result(assignment, known.reason).model_copy(update={"notes": notes})
    execution = with_relief(assignment.execution, known.execution if known is not None else None)
    start = newest or (Path(assignment.start) if assignment.start else None)
    update = {"execution": execution, "start": str(start) if start else None}
    now = SteppedDown(execution=execution, notes=notes, reason="")

    def on_relief(smaller: ExecutionPlan, note: str) -> None:
        nonlocal now
        now = SteppedDown(execution=smaller, notes=(*now.notes, note), reason=note)
        if ranks.first:  # in this order: a group killed in between begins as it was planned, and comes here again
            drop_later_checkpoints(folder, start)
            write_json(_stepped_down_file(assignment), now)

    try:
        result = host.run(assignment.model_copy(update=update), on_relief=on_relief)
    except RankOutOfMemoryError as error:
        assert now.execution is not None
        write_json(_stepped_down_file(assignment), _step_down(now.execution, now.notes, error))
        raise
    if ranks.first and fits_in_no_way(result):
        _stepped_down_file(assignment).unlink(missing_ok=True)  # another submission tries it as it is planned
    relieved = result.relieved or (execution if execution != assignment.execution else None)
    return result.model_copy(update={"notes": (*notes, *result.notes), "relieved": relieved})


def _step_down(execution: ExecutionPlan, notes: tuple[str, ...], error: RankOutOfMemoryError) -> SteppedDown:
    relief = relieve(execution)
    if relief is None:
        return SteppedDown(execution=None, notes=notes, reason=str(nothing_smaller(error.what, execution)))
    note = f"out of memory: the worker group was replaced and the trial {relief.sentence}"
    return SteppedDown(execution=relief.execution, notes=(*notes, note), reason=error.what)


def _stepped_down(assignment: Assignment) -> SteppedDown | None:
    file = _stepped_down_file(assignment)
    return read_record(file, SteppedDown) if file.exists() else None


def _stepped_down_file(assignment: Assignment) -> Path:
    return Path(assignment.folder) / STEPPED_DOWN


def _note_start(folder: Path, pid: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STARTS).open("a") as file:
        file.write(f"{pid}\n")
