"""A real sweep that is ended by its GPU-hours, and goes on when it is given more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.hours import read_hours
from orchestrator.store import check_folder

from .runs import (
    NOWHERE,
    TIMEOUT_S,
    events_of,
    losses_of,
    run_folder,
    snapshot,
    start,
    submit,
    sweep_of,
    transfer_of,
    write_spec,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3 * TIMEOUT_S)]

SEARCH: dict[str, Any] = {
    "layers": ["last:1"],
    "tune": ["lora"],
    "learning_rate": {"lora": [2e-3, 2e-2]},
    "lora_rank": [4],
    "algorithm": "random",
    "scheduler": "none",
    "max_forgetting": 10,
    "trials": 2,
}


def lay_over(spec: Path, **sections: dict[str, Any]) -> None:
    values = json.loads(spec.read_text())
    for section, given in sections.items():
        values[section] = {**values.get(section, {}), **given}
    spec.write_text(json.dumps(values))


def trained(run: Path) -> dict[str, list[str]]:
    """The exact losses of the trials that made a step."""
    return {trial_id: losses for trial_id, losses in losses_of(run).items() if losses}


@pytest.mark.slow
def test_a_sweep_ends_with_its_best_so_far_when_its_hours_are_used_up_and_goes_on_with_more(
    tmp_path: Path, ray_here: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two trials; then four more and hardly any hours; at last enough."""
    spec = write_spec(tmp_path, "hours", search=SEARCH, resources={"gangs": 1, "ranks_per_gang": 1})
    run = run_folder(spec)
    assert submit("sweep", spec) == 0
    used = read_hours(run / "hours.json")
    assert used == sweep_of(run).gpu_hours_used > 0
    first = trained(run)
    assert len(first) == 2

    lay_over(spec, search={"trials": 6}, resources={"max_gpu_hours": used + 1e-6})
    assert submit("sweep", spec) == 0
    ended = sweep_of(run)
    assert trained(run) == first, "no trial began"
    assert "after 2 of 6 trials" in ended.ended_by_hours
    assert ended.winner_id in first
    waited = [trial for trial in ended.searched if trial.trial_id not in first]
    assert waited
    assert all(trial.state == "stopped" and "max_gpu_hours" in trial.reason for trial in waited)
    assert ended.gpu_hours_used > used
    assert len(events_of(run, "hours_spent")) == len(events_of(run, "ended_by_hours")) == 1
    assert "ended     the search was ended after 2 of 6 trials" in capfd.readouterr().out
    assert "The search was ended after 2 of 6 trials" in (run / "report.html").read_text()
    check_folder(run / "bundle")

    lay_over(spec, resources={"max_gpu_hours": ended.gpu_hours_used + 100})
    assert submit("sweep", spec) == 0
    whole = sweep_of(run)
    assert len(trained(run)) == 6
    assert first.items() <= trained(run).items()
    assert whole.ended_by_hours == ""
    assert [trial.state for trial in whole.searched] == ["finished"] * 6
    assert transfer_of(run).verdict is not None


@pytest.mark.slow  # tests/unit/runtime has the bound; this one looks at a whole run that it ends
def test_a_bound_that_is_used_up_by_loading_the_base_promotes_nothing(
    tmp_path: Path, ray_here: None, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, "none", search=SEARCH, resources={"gangs": 1, "ranks_per_gang": 1, "max_gpu_hours": 1e-6})
    run = run_folder(spec)
    assert submit("sweep", spec) == 0
    sweep = sweep_of(run)
    assert (sweep.searched, sweep.winner_id) == ((), None)
    assert sweep.gpu_hours_used == read_hours(run / "hours.json") > 1e-6
    assert "after 0 of 2 trials" in sweep.ended_by_hours
    assert sweep.advice[0].startswith("raise resources.max_gpu_hours")
    assert len(events_of(run, "hours_spent")) == len(events_of(run, "ended_by_hours")) == 1
    said = capfd.readouterr().out
    assert "ended     the search was ended after 0 of 2 trials" in said
    assert "raise resources.max_gpu_hours" in said
    assert "The search was ended after 0 of 2 trials" in (run / "report.html").read_text()

    before = snapshot(run / "trials")
    again = start("sweep", spec, RAY_ADDRESS=NOWHERE)
    assert again.wait(TIMEOUT_S) == 0, "the same bound shows the run that has ended, and needs no Ray"
    assert snapshot(run / "trials") == before
