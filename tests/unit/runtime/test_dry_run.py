"""`--dry-run`: everything is checked, nothing is started, nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import DataError, RunConflictError, UsageError
from orchestrator.run.directory import RunDirectory
from orchestrator.runtime import rehearse
from orchestrator.spec import LoadedSpec, load_spec, spec_sha256
from orchestrator.this_machine import describe_this_machine


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    rows = [{"prompt": f"the year {number}", "completion": f"{number} and peace"} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "x",
        "base": {"model": "sample"},
        "task": "completion",
        "data": {"train": "rows.jsonl", "max_tokens": 64},
        "search": {"layers": ["last:2"], "trials": 2},
        "train": {"tokens_per_step": 512},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(values))
    return tmp_path / "spec.yaml"


def rehearsed(loaded: LoadedSpec):
    return rehearse(loaded, "sweep", cluster=describe_this_machine)


def test_a_new_run_is_planned_from_its_data_and_leaves_no_trace(spec: Path):
    before = sorted(spec.parent.rglob("*"))
    found = rehearsed(load_spec(spec))
    assert found.would == "start a new run"
    assert found.plan.data.exact
    assert found.plan.data.train_documents == found.data.splits["train"].documents == 48
    assert found.run_folder == spec.parent / "runs" / "x"
    assert sorted(spec.parent.rglob("*")) == before


def test_what_a_submission_would_refuse_is_refused(spec: Path):
    loaded = load_spec(spec)
    with pytest.raises(UsageError, match="no_such_module"):
        rehearsed(load_spec(spec, ["search.metric=no_such_module:f"]))
    with pytest.raises(DataError, match="no column 'question'"):
        rehearsed(load_spec(spec, ["data.columns.prompt=question"]))
    with RunDirectory.open(spec.parent / "runs", "x", loaded, spec_sha256(loaded.spec, "sweep")) as run:
        with pytest.raises(RunConflictError, match="already running this run"):
            rehearsed(loaded)
        run.plan.write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in spec.parent.rglob("*")}
    assert rehearsed(loaded).would == "continue an interrupted run"
    with pytest.raises(RunConflictError, match=r"train\.epochs: 2\.0 -> 3\.0"):
        rehearsed(load_spec(spec, ["train.epochs=3"]))
    assert {path: path.stat().st_mtime_ns for path in spec.parent.rglob("*")} == before
