"""What is settled before anything runs, and what an earlier submission settled already."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from orchestrator.errors import RunConflictError
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.report.terminal import LogView
from orchestrator.runtime.prepare import Prepared, open_run, prepare, reopen
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import load_spec
from orchestrator.store import read_jsonl
from orchestrator.units import GIB

TWO_CORES = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=8 * GIB),))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE_BASE, tmp_path / "base"))


@pytest.fixture
def shown() -> io.StringIO:
    """What the run's view has said."""
    return io.StringIO()


@pytest.fixture
def submit(tmp_path: Path, base: Path, shown: io.StringIO) -> Callable[..., Prepared]:
    """Prepares the same small sweep, every time it is called."""
    rows = [{"prompt": f"Count to {number}.", "completion": f"{number} it is"} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"name": "run", "base": {"model": "base"}, "task": "completion", "data": {"train": "train.jsonl", "max_tokens": 64}}
    YAML().dump({**spec, "search": {"layers": ["last:1"], "trials": 2}}, tmp_path / "spec.yaml")
    loaded = load_spec(tmp_path / "spec.yaml")
    view = LogView(shown)

    def prepared(cluster: ClusterDescription = TWO_CORES) -> Prepared:
        with open_run(loaded, "sweep", tmp_path / "runs", view) as run:
            return prepare(loaded, "sweep", run, view, lambda: cluster)

    return prepared


def test_a_copy_of_the_base_is_the_same_base(submit: Callable[[], Prepared], base: Path) -> None:
    first = submit()
    for file in base.iterdir():
        file.touch()
    assert submit().plan == first.plan


def test_a_base_that_changed_under_a_planned_run_is_refused(submit: Callable[[], Prepared], base: Path) -> None:
    run = submit().run.path
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(RunConflictError, match=r"weights\.model\.safetensors: \d+ bytes, \w+ -> \d+ bytes") as caught:
        submit()
    assert caught.value.exit_code == 2
    with pytest.raises(RunConflictError, match="another base"):
        reopen(run)


def test_a_changed_config_is_told_by_its_key(submit: Callable[[], Prepared], base: Path) -> None:
    submit()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    with pytest.raises(RunConflictError, match=r"config\.rms_norm_eps: .* -> 0\.25"):
        submit()


def test_before_the_first_plan_the_base_may_still_be_mended(submit: Callable[[], Prepared], base: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    submit()
    (tmp_path / "runs" / "run" / "plan.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    submit()


def test_a_run_that_goes_elsewhere_than_asked_is_told_and_recorded(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    uploaded.mkdir(parents=True)
    spec = {"name": "run", "base": {"model": str(base)}, "task": "completion", "data": {"train": "train.jsonl"}, "search": {}}
    YAML().dump(spec, uploaded / "spec.yaml")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "orchestrator-runs").mkdir(parents=True)
    shown = io.StringIO()
    with open_run(load_spec(uploaded / "spec.yaml"), "sweep", None, LogView(shown)) as run:
        assert run.path == tmp_path / "home" / "orchestrator-runs" / "run"
        (event,) = read_jsonl(run.path / "events.jsonl")
    assert event["kind"] == "output_moved"
    assert event["message"] in shown.getvalue()


def test_the_plans_warnings_are_shown_and_recorded(submit: Callable[..., Prepared], shown: io.StringIO) -> None:
    several = ClusterDescription(nodes=(NodeDescription(count=2, num_cpus=2, memory_bytes=8 * GIB),))
    prepared = submit(several)
    (warning,) = prepared.plan.warnings
    assert f"warning: {warning}" in shown.getvalue()
    assert [event["message"] for event in read_jsonl(prepared.run.path / "events.jsonl")] == [warning]
