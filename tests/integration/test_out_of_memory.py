"""Real runs in which one of two ranks runs out of memory: the trial goes on smaller, to the numbers of a smaller plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.ledger import TrialEntry
from orchestrator.work.execution import ExecutionPlan

from .counter import open_counter
from .cramped import cramped_ray
from .runs import TIMEOUT_S, events_of, losses_in, run_folder, submit, sweep_of, transfer_of, trials_of, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3 * TIMEOUT_S)]

PLANNED_ROWS = 2
"""A step of 256 tokens is four rows of 64, two for each of two ranks."""


@pytest.fixture(scope="module", autouse=True)
def cramped() -> Iterator[None]:
    """Rank 1 computes one row of `last:1`, no row of `first:1`, and any number of others."""
    with cramped_ray({("last:1", "full"): 1, ("first:1", "full"): 0}, rank=1):
        yield


def sweep_spec(folder: Path, zero: int, layers: list[str], **search: Any) -> Path:
    """One full-tuning trial of each policy, in their order, by one gang of two ranks."""
    values = {"layers": layers, "tune": ["full"], "learning_rate": {"full": [1e-3, 1e-2]}, "trials": len(layers)}
    rules = {"algorithm": "grid", "scheduler": "none", "max_forgetting": 10}
    return write_spec(
        folder,
        f"zero-{zero}",
        train={"tokens_per_step": 256},
        search={**values, **rules, **search},
        resources={"gangs": 1, "ranks_per_gang": 2, "zero": zero},
    )


def deaths_of(run: Path, trial_id: str) -> list[str]:
    return [event["message"] for event in events_of(run, "gang_died") if event["trial_id"] == trial_id]


def reduced_execution_of(entry: TrialEntry) -> ExecutionPlan | None:
    return entry.results[-1].reduced_execution


def assert_numbers_of_a_smaller_plan(run: Path, entry: TrialEntry, folder: Path) -> None:
    """The same trial by a plan that had one row from the start: the same losses, bit for bit."""
    trial = entry.trial
    with open_counter(run, folder, rows=1) as counter:
        assert counter.train(counter.trial(trial.tune, trial.learning_rate, trial.number)).state == "done"
    steps = entry.results[-1].step
    assert losses_in(run / "trials" / trial.trial_id) == losses_in(folder / trial.trial_id)[:steps]


@pytest.mark.slow
def test_under_zero_2_one_trial_goes_on_smaller_and_the_next_as_planned(tmp_path: Path) -> None:
    """That a smaller execution has the numbers of a smaller plan is proven without Ray, in test_relief_in_a_gang.py."""
    spec = sweep_spec(tmp_path, 2, ["last:1", "last:2"])
    assert submit("sweep", spec) == 0
    run = run_folder(spec)
    smaller, undisturbed = trials_of(run)

    assert smaller.results[-1].state == "done"
    reduced = reduced_execution_of(smaller)
    assert reduced is not None
    assert (reduced.micro_batch_rows, reduced.checkpointing, reduced.zero_stage) == (1, False, 2)
    (died,) = deaths_of(run, smaller.trial.trial_id)
    assert "out of memory on rank 1" in died
    assert "restarted with 1 row per micro-batch" in died
    notes = [event["message"] for event in events_of(run, "trial_note") if event["trial_id"] == smaller.trial.trial_id]
    assert len(notes) == 1

    assert undisturbed.results[-1].state == "done"
    assert (reduced_execution_of(undisturbed), deaths_of(run, undisturbed.trial.trial_id)) == (None, [])
    sweep = sweep_of(run)
    assert [trial.state for trial in sweep.searched] == ["finished", "finished"]
    assert (sweep.gangs_replaced, sweep.base_loads) == (1, 2)
    assert sweep.winner_id is not None


@pytest.mark.slow
def test_under_zero_2_a_trial_that_cannot_be_reduced_fails_and_the_sweep_goes_on(tmp_path: Path) -> None:
    spec = sweep_spec(tmp_path, 2, ["first:1", "last:2"])
    assert submit("sweep", spec) == 0
    run = run_folder(spec)
    failed, undisturbed = trials_of(run)
    (result,) = failed.results
    assert (result.state, len(result.notes)) == ("failed", 2)
    assert "resources.zero: 3" in result.reason
    assert len(deaths_of(run, failed.trial.trial_id)) == 3
    assert undisturbed.results[-1].state == "done"
    sweep = sweep_of(run)
    assert [trial.state for trial in sweep.searched] == ["failed", "finished"]
    assert (sweep.gangs_replaced, sweep.base_loads) == (3, 4)


@pytest.mark.slow
def test_under_zero_3_a_trial_goes_on_smaller_and_its_refit_knows(tmp_path: Path) -> None:
    spec = sweep_spec(tmp_path, 3, ["last:1"], budget=0.5)
    assert submit("sweep", spec) == 0
    run = run_folder(spec)
    (entry,) = trials_of(run)
    assert entry.results[-1].state == "done"
    assert entry.results[-1].engine is not None
    assert entry.results[-1].engine.zero_stage == 3
    reduced = reduced_execution_of(entry)
    assert reduced is not None
    assert reduced.micro_batch_rows == 1
    assert len(deaths_of(run, entry.trial.trial_id)) == 1
    refit = transfer_of(run).refit
    assert refit is not None
    assert (refit.ran, refit.zero_stage, refit.ranks, refit.restarts) == (True, 3, 2, 0), "it began with one row"
    assert_numbers_of_a_smaller_plan(run, entry, tmp_path / "smaller")


@pytest.mark.slow
def test_a_job_of_one_trial_goes_on_smaller(tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path,
        "one",
        finetune={"layers": "last:1", "tune": "full", "learning_rate": 2e-3},
        train={"tokens_per_step": 256},
        resources={"ranks_per_gang": 2, "zero": 2},
    )
    assert submit("finetune", spec) == 0
    run = run_folder(spec)
    (entry,) = trials_of(run)
    reduced = reduced_execution_of(entry)
    assert reduced is not None
    assert reduced.micro_batch_rows == 1
    (note,) = [event["message"] for event in events_of(run, "trial_note")]
    assert "the worker group was replaced and the trial restarted with 1 row per micro-batch" in note
    transfer = transfer_of(run)
    assert transfer.refit is not None
    assert transfer.refit.restarts == 1
    assert transfer.verification is not None
    assert transfer.verification.passed
