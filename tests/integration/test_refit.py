"""The one-trial job by Ray Train: on two ranks, and to the same numbers whoever is killed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.run.layout import PROGRESS
from orchestrator.run.reader import RunRecords, read_run
from orchestrator.store import check_folder, read_json
from orchestrator.train import find_latest
from orchestrator.transfer.run_view import Progress

from .runs import (
    TIMEOUT_S,
    kill_driver,
    kill_process,
    losses_in,
    meanwhile,
    run_folder,
    snapshot,
    start,
    submit,
    sweep_of,
    transfer_of,
    wait_until,
    write_spec,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3 * TIMEOUT_S)]


def write(folder: Path) -> Path:
    """Steps enough that a test can look between two checkpoints."""
    return write_spec(
        folder,
        "refit",
        finetune={"layers": "last:2", "tune": "full", "learning_rate": 2e-3},
        train={"epochs": 4},
        resources={"ranks_per_gang": 2},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """The run of a job that nobody disturbed."""
    spec = write(tmp_path_factory.mktemp("whole"))
    assert submit("finetune", spec) == 0
    return run_folder(spec)


def half_way(run: Path) -> bool:
    """Whether there is a checkpoint, and steps are still to come."""
    return any((run / "refit").glob("checkpoint-*")) and not (run / "refit" / "result.json").exists()


def assert_same_end(run: Path, other: Path, *, restarts: int) -> None:
    losses = losses_in(run / "refit")
    assert losses == losses_in(other / "refit")
    (mine,), (theirs,) = sweep_of(run).searched, sweep_of(other).searched
    assert len(losses) == mine.total_steps
    assert mine.metric == theirs.metric
    check_folder(run / "bundle")
    transfer = transfer_of(run)
    assert transfer.verification is not None
    assert transfer.verification.passed
    assert transfer.refit is not None
    assert transfer.refit.restarts == restarts


def test_one_trial_comes_to_a_verified_bundle_on_two_ranks(uninterrupted: Path) -> None:
    assert_same_end(uninterrupted, uninterrupted, restarts=0)
    now = Progress.model_validate(read_json(uninterrupted / PROGRESS))
    assert (now.phase, now.ended, now.error) == ("merge", True, "")
    refit = transfer_of(uninterrupted).refit
    assert refit is not None
    assert (refit.ran, refit.executor, refit.ranks) == (True, "torch", 2)
    (trial,) = sweep_of(uninterrupted).searched
    assert trial.engine is not None
    assert trial.engine.partitioned_bytes > 0


def test_a_killed_rank_goes_on_from_its_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    spec = write(tmp_path)
    run = run_folder(spec)

    seen: list[RunRecords] = []

    def kill_rank_0() -> None:
        wait_until(lambda: half_way(run))
        seen.append(read_run(run))
        kill_process(int((run / "refit" / "starts.txt").read_text().split()[0]))

    with meanwhile(kill_rank_0):
        assert submit("finetune", spec) == 0
    assert_same_end(run, uninterrupted, restarts=1)
    assert seen[0].alive, "the driver is heard of while it works"
    assert seen[0].sweep is not None
    (trial,) = seen[0].sweep.searched
    assert seen[0].step_of(trial) > 0, "the report of a run in progress knows the step that stands on disk"


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_the_newest_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    spec = write(tmp_path)
    run = run_folder(spec)
    driver = start("finetune", spec)
    wait_until(lambda: half_way(run), while_alive=driver)
    assert kill_driver(driver) == [], "processes outlived their driver"
    newest = find_latest(run / "refit")
    assert newest is not None
    written = snapshot(newest)

    assert submit("finetune", spec) == 0
    assert_same_end(run, uninterrupted, restarts=1)
    assert not newest.exists() or snapshot(newest) == written
