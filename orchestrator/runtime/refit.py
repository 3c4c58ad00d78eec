"""Training one trial to the full budget with Ray Train: fault-tolerant, on all the ranks that the plan gives it.

What is committed is decided by our own checkpoints (`train.find_latest`), not by `ray.train.report`, which is not
durable when it returns. A worker group that lost a rank starts again from the newest checkpoint that is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ray import train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import TrainingError
from orchestrator.plan.values import Assignment, BaseLoad, RungResult
from orchestrator.runtime.cluster import rank_resources, worker_env
from orchestrator.store import read_json, write_json

MAX_RESTARTS = 3
STARTS = "starts.txt"
"""A line for every time that a worker group began."""


def refit(base: BaseLoad, anatomy: ModelAnatomy, assignments: list[Assignment], folder: Path) -> list[RungResult]:
    """Run assignments one after another in one worker group.

    Args:
        assignments: For instance the untouched base's evaluation, then the trial. All share one execution plan.
        folder: Where Ray Train keeps its own state.

    Returns:
        Rank 0's result of each assignment, also written as `result.json` beside each assignment's files.

    Raises:
        TrainingError: the worker group failed more than MAX_RESTARTS times.
    """
    # Ray writes its snapshot of a run in place; one that a killed driver left torn makes the folder unusable.
    shutil.rmtree(folder, ignore_errors=True)
    execution = assignments[0].execution
    payload = {
        "base": base.model_dump(mode="json"),
        "anatomy": anatomy.model_dump(mode="json"),
        "assignments": [assignment.model_dump(mode="json") for assignment in assignments],
    }
    trainer = TorchTrainer(
        _worker,
        train_loop_config=payload,
        torch_config=TorchConfig(backend=execution.backend),
        scaling_config=train.ScalingConfig(
            num_workers=execution.ranks,
            use_gpu=execution.device == "cuda",
            resources_per_worker=rank_resources(execution),
        ),
        run_config=train.RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=train.FailureConfig(max_failures=MAX_RESTARTS),
            worker_runtime_env={"env_vars": worker_env(execution)},
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise TrainingError(
            f"the refit failed: {error}",
            where=str(folder),
            remedy="submit the same spec again: it goes on from the newest whole checkpoint",
        ) from error
    return [RungResult.model_validate(read_json(result_file(assignment))) for assignment in assignments]


def num_restarts(folder: Path) -> int:
    """How often a refit in this folder was begun again, by its worker group or by another submission."""
    starts = folder / STARTS
    return max(0, len(starts.read_text().splitlines()) - 1) if starts.exists() else 0


def result_file(assignment: Assignment) -> Path:
    return Path(assignment.folder) / "result.json"


def _worker(payload: dict[str, Any]) -> None:
    """One rank of the refit. Ray Train has made the process group."""
    from orchestrator.train import TrainHost, find_latest

    base, anatomy = BaseLoad.model_validate(payload["base"]), ModelAnatomy.model_validate(payload["anatomy"])
    assignments = [Assignment.model_validate(values) for values in payload["assignments"]]
    context = train.get_context()
    rank = context.get_world_rank()
    host = TrainHost.create(base, anatomy, assignments[0].execution, rank, context.get_world_size(), init_method=None)
    ranks = host.ranks
    if rank == 0:
        _note_start(Path(assignments[-1].folder), os.getpid())
    try:
        for assignment in assignments:
            newest = ranks.broadcast(find_latest(Path(assignment.folder)) if ranks.first else None)
            result = host.run(assignment.model_copy(update={"start": str(newest)}) if newest else assignment)
            if rank == 0:
                write_json(result_file(assignment), result)
            train.report({"trial_id": result.trial_id, "step": result.step, "state": result.state})
    finally:
        host.close()


def _note_start(folder: Path, pid: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STARTS).open("a") as file:
        file.write(f"{pid}\n")
