"""What is settled before anything runs, and what an earlier submission settled already."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from orchestrator.errors import RunConflictError, UsageError
from orchestrator.plan.defaults import with_section
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.report.terminal import LogView
from orchestrator.runtime.prepare import Prepared, base_of, open_run, prepare, reopen
from orchestrator.spec import load_spec
from orchestrator.store import read_jsonl, write_json
from orchestrator.units import GIB


def test_a_copy_of_the_base_is_the_same_base(submit: Callable[[], Prepared], base: Path) -> None:
    first = submit()
    for file in base.iterdir():
        file.touch()
    assert submit().plan == first.plan


def test_steps_stay_as_large_as_the_run_began_with(submit: Callable[..., Prepared]) -> None:
    """A later version may come to another size for the same data, and a larger cluster too: trials go on with theirs."""
    first = submit()
    assert first.spec.train.tokens_per_step == "auto"
    assert first.settings.tokens_per_step == first.plan.data.tokens_per_step > 0
    assert submit().plan == first.plan
    two_ranks = {"ranks_per_gang": 2, "gangs": 1}
    assert submit(resources=two_ranks).plan.data == first.plan.data
    before = first.plan.data.model_copy(update={"tokens_per_step": 72})
    write_json(first.run.plan, first.plan.model_copy(update={"data": before}))
    again = submit()
    assert again.settings.tokens_per_step == again.plan.data.tokens_per_step == 72
    assert again.plan.data.steps_per_epoch < first.plan.data.steps_per_epoch


def test_a_step_is_large_enough_for_the_ranks_of_a_gang(submit: Callable[..., Prepared]) -> None:
    plan = submit(resources={"ranks_per_gang": 2, "gangs": 1}).plan
    assert (plan.execution.ranks, plan.data.step_ranks) == (2, 2)
    assert plan.data.tokens_per_step >= 2 * plan.execution.row_tokens


def test_what_stands_in_for_a_section_is_told(tmp_path: Path, base: Path, shown: io.StringIO) -> None:
    rows = [{"prompt": f"Count to {number}.", "completion": f"{number} it is"} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"name": "run", "base": {"model": "base"}, "task": "completion", "data": {"train": "train.jsonl"}}
    YAML().dump(spec, tmp_path / "spec.yaml")
    given = load_spec(tmp_path / "spec.yaml")
    loaded = with_section(given, "sweep", lambda: base_of(given, None).anatomy())
    view, cluster = LogView(shown), ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=8 * GIB),))
    with open_run(loaded, "sweep", tmp_path / "runs", view) as run:
        prepare(loaded, "sweep", run, view, lambda: cluster)
    assert "default_section: the spec has no `search` section; the default search: last:2" in shown.getvalue()
    assert [line for line in read_jsonl(run.path / "events.jsonl") if line["kind"] == "default_section"]
    assert reopen(run.path).spec.search == loaded.spec.search


def test_a_base_that_changed_under_a_planned_run_is_refused(submit: Callable[[], Prepared], base: Path) -> None:
    run = submit().run.path
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(RunConflictError, match=r"weights\.model\.safetensors: \d+ bytes, \w+ -> \d+ bytes") as caught:
        submit()
    assert caught.value.exit_code == 2
    with pytest.raises(RunConflictError, match="folder differs from when"):
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
    events = read_jsonl(prepared.run.path / "events.jsonl")
    assert [event["message"] for event in events if event["kind"] != "data"] == [warning]


def test_what_was_found_out_about_the_data_is_told_before_the_plan_and_recorded(
    submit: Callable[..., Prepared], shown: io.StringIO, tmp_path: Path
) -> None:
    """Control codes in a file's name are escaped."""
    rows = [
        {"prompt": f"Count to {number}.", "completion": f"{number} it is" * (60 if number % 2 else 1)} for number in range(60)
    ]
    (tmp_path / "tr\x1bain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = submit(data={"train": "tr\x1bain.jsonl", "max_tokens": 64})
    warned, told = ([n.line for n in prepared.data.told if n.level == level] for level in ("warning", "info"))
    assert re.match(
        r"2\d of 4\d rows of train \(\d\d%\) are dropped: 2\d longer than data.max_tokens = 64; to do: raise", warned[0]
    )
    assert told[0].startswith("train: tr\\x1bain.jsonl is JSON Lines; 60 rows read as prompt_completion")
    assert told[1].endswith("longer than data.max_tokens = 64 (tr\\x1bain.jsonl:2, tr\\x1bain.jsonl:4, tr\\x1bain.jsonl:6, ...)")
    assert "\x1b" not in shown.getvalue()
    assert all(f" warning: {line}\n" in shown.getvalue() for line in warned)
    assert all(f" data: {line}\n" in shown.getvalue() for line in told)
    recorded = [(event["kind"], event["message"]) for event in read_jsonl(prepared.run.path / "events.jsonl")]
    assert recorded[: len(warned) + len(told)] == [("warning", line) for line in warned] + [("data", line) for line in told]


@pytest.mark.parametrize("metric", ["nowhere:score", "house_metric:misspelt"])
def test_a_metric_that_cannot_be_imported_is_refused_before_a_cluster_is_asked_for(
    metric: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "house_metric.py").write_text("def score(predictions, answers):\n    return 1.0\n")
    spec = {"name": "run", "base": {"model": str(base)}, "task": "completion", "data": {"train": "train.jsonl"}}
    YAML().dump({**spec, "search": {"metric": metric}}, tmp_path / "spec.yaml")
    loaded, view = load_spec(tmp_path / "spec.yaml"), LogView(io.StringIO())
    with (
        open_run(loaded, "sweep", tmp_path / "runs", view) as run,
        pytest.raises(UsageError, match="cannot be imported") as caught,
    ):
        prepare(loaded, "sweep", run, view, lambda: pytest.fail("the cluster was asked for"))
    assert caught.value.exit_code == 2
    assert "spec.yaml:" in caught.value.where


def test_a_metric_beside_the_job_is_found_as_its_workers_find_it(
    submit: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A console script has not the folder on its path where it is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "house_metric_beside.py").write_text("def score(predictions, answers):\n    return 1.0\n")
    before = list(sys.path)
    assert submit(search={"metric": "house_metric_beside:score"}).scoring.metric == "house_metric_beside:score"
    assert sys.path == before
