"""Runs listed, compared, and read through the Python API."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import orchestrator
from orchestrator.cli.commands import app
from orchestrator.errors import UsageError
from orchestrator.report.listing import compare_runs, list_runs


def identify(folder: Path, created: float = 1_790_000_000.0, **values: object) -> Path:
    resolved = {"name": folder.name, "train": {"epochs": 2, "seed": 0}, **values}
    identity = {"name": folder.name, "spec_sha256": "a" * 64, "created": created, "submissions": [created], "seed": 0}
    (folder / "run.json").write_text(json.dumps({**identity, "versions": {}, "values": resolved}))
    return folder


def judge(folder: Path, test: str, losses: list[float]) -> Path:
    """A test set by its hash, and the promoted model's losses on it."""
    (folder / "data" / "summary.json").write_text(json.dumps({"splits": {"test": {"sha256": test, "documents": len(losses)}}}))
    (folder / "test").mkdir(exist_ok=True)
    tokens = np.full(len(losses), 4)
    with (folder / "test" / "promoted.npz").open("wb") as file:
        np.savez(file, loss_sums=np.asarray(losses) * tokens, num_tokens=tokens)
    return folder


@pytest.fixture
def runs(fake_run: Callable[..., Path], make, tmp_path: Path) -> dict[str, Path]:
    """Four runs in one folder: finished, interrupted, in progress, damaged."""
    folder = tmp_path / "runs"
    found: dict[str, Path] = {}
    parts = {"done": {}, "cut": {"sweep": None, "transfer": None}, "busy": {"transfer": None}, "torn": {}}
    for number, (name, left) in enumerate(parts.items()):
        written = fake_run(**left)
        found[name] = identify(written.rename(_beside(folder, name)), 1_790_000_000.0 + number)
    (found["torn"] / "run.json").write_text('{"name": "to')
    (folder / "no-run").mkdir()
    return found


def _beside(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    return folder / name


def test_every_run_has_a_line_with_its_state(runs: dict[str, Path]):
    with (runs["busy"] / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = {Path(line.folder).name: line for line in list_runs(runs["done"].parent)}
    assert {name: line.state for name, line in lines.items()} == {
        "done": "finished",
        "cut": "interrupted",
        "busy": "running",
        "torn": "damaged",
    }
    assert lines["done"].verdict == "positive"
    assert lines["done"].trials == 16
    assert lines["done"].num_bytes > 1000
    assert "not valid JSON" in lines["torn"].problem


def test_a_file_with_two_names_takes_its_room_once(runs: dict[str, Path]):
    before = list_runs(runs["done"])[0].num_bytes
    (runs["done"] / "weights").write_bytes(b"x" * 5000)
    (runs["done"] / "same").hardlink_to(runs["done"] / "weights")
    assert list_runs(runs["done"])[0].num_bytes == before + 5000


def test_the_commands_print_tables_and_json(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs["done"].parent.parent)
    shown = CliRunner().invoke(app, ["runs"])
    assert shown.exit_code == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 100
    assert "interrupted" in shown.stdout
    listed = json.loads(CliRunner().invoke(app, ["runs", "runs", "--json"]).stdout)
    assert len(listed) == 4
    refused = CliRunner().invoke(app, ["runs", "nowhere"])
    assert refused.exit_code == 2
    assert "no such folder" in refused.stderr


def test_runs_on_one_test_set_are_compared_by_document(runs: dict[str, Path]):
    one, other = runs["done"], runs["busy"]
    (other / "transfer.json").write_text((one / "transfer.json").read_text())
    judge(one, "same", [1.0 + 0.01 * n for n in range(40)])
    judge(other, "same", [1.5 + 0.01 * n for n in range(40)])
    identify(other, train={"epochs": 3, "seed": 0})
    compared = compare_runs([one, other])
    assert compared.comparable
    assert compared.spec == (("train.epochs", ("2", "3")),)
    assert "0.500" in compared.differences[0]
    assert compared.differences[0].endswith("better")
    figures = dict(compared.figures)
    assert figures["verdict"] == ("positive", "positive")
    assert "forgetting" in figures


@pytest.mark.parametrize("why", ["another test set", "not judged"])
def test_what_is_not_comparable_is_called_so(runs: dict[str, Path], why: str):
    one, other = judge(runs["done"], "one", [1.0] * 30), judge(runs["busy"], "one", [1.0] * 30)
    if why == "another test set":
        (other / "transfer.json").write_text((one / "transfer.json").read_text())
        judge(other, "other", [1.0] * 20)
    shown = CliRunner().invoke(app, ["compare", str(one), str(other)])
    assert shown.exit_code == 0, shown.stderr
    assert "NOT COMPARABLE" in shown.stdout
    said = "the test sets differ" if why == "another test set" else "has not been judged"
    assert said in " ".join(shown.stdout.split())
    assert "paired" not in shown.stdout


@pytest.mark.parametrize("which", [["done"], ["done", "done"], ["done", "../.."]])
def test_what_cannot_be_compared_is_refused(runs: dict[str, Path], which: list[str]):
    folders = [str(runs["done"].parent / name) for name in which]
    refused = CliRunner().invoke(app, ["compare", *folders])
    assert refused.exit_code == 2, refused.stdout


def test_the_api_reads_a_finished_run(runs: dict[str, Path], tmp_path: Path):
    run = orchestrator.load_run(runs["done"])
    assert (run.verdict, run.finished) == ("positive", True)
    assert "positive" in run.sentence
    trials = run.trials
    assert trials.index.name == "trial_id"
    assert trials["promoted"].sum() == 1
    assert len(trials) == len(run.sweep.trials)
    promoted = str(trials.index[trials["promoted"]][0])
    number = int(trials.loc[promoted, "number"])
    assert trials.loc[promoted, "learning_rate"] == run.trial(number).learning_rate == run.trial(promoted).learning_rate
    assert run.figures
    first = next(iter(run.figures.values()))
    assert first.svg.startswith("<svg")
    assert first.save(tmp_path / "first.svg").read_text() == first.svg
    assert run.figures._repr_html_().count("<svg") == len(run.figures)
    assert "<table" in run._repr_html_()
    assert run.report().name == "report.html"
    with pytest.raises(UsageError, match="no bundle"):
        _ = run.bundle
    with pytest.raises(KeyError, match="no figure 'Nothing'; there are"):
        _ = run.figures["Nothing"]


def test_the_api_reads_a_run_that_has_not_begun(runs: dict[str, Path], tmp_path: Path):
    run = orchestrator.load_run(runs["cut"])
    assert (run.verdict, run.finished) == (None, False)
    assert len(run.trials) == (len(run.sweep.trials) if run.sweep else 0)
    assert {"layers", "metric", "promoted"} <= set(run.trials.columns)
    with pytest.raises(UsageError, match="not a run directory"):
        orchestrator.load_run(tmp_path / "nowhere")
