"""A run's folder: whose it is, and one driver at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import IntegrityError, RunConflictError
from orchestrator.run.directory import RunDirectory
from orchestrator.spec import LoadedSpec, load_spec, spec_sha256
from orchestrator.store import read_jsonl, versions

SPEC = """\
name: tutor
base: {model: sample}
task: completion
data: {train: train.jsonl, eval: 0.2}
search: {layers: ["last:2"], trials: 4}
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedSpec:
    return written(tmp_path, SPEC)


def written(folder: Path, text: str) -> LoadedSpec:
    (folder / "spec.yaml").write_text(text)
    return load_spec(folder / "spec.yaml")


def opened(folder: Path, loaded: LoadedSpec) -> RunDirectory:
    return RunDirectory.open(folder / "runs", loaded.spec.name, loaded, spec_sha256(loaded.spec, "sweep"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_says_what_it_is(tmp_path: Path, loaded: LoadedSpec) -> None:
    with opened(tmp_path, loaded) as run:
        assert run.path == tmp_path / "runs" / "tutor"
        identity = run.identity
    assert identity["name"] == "tutor"
    assert identity["spec_sha256"] == spec_sha256(loaded.spec, "sweep")
    assert identity["versions"] == versions()
    assert {"torch", "ray", "deepspeed", "transformers", "peft", "bitsandbytes"} <= identity["versions"].keys()
    assert identity["seed"] == 0
    assert identity["values"] == loaded.spec.model_dump(mode="json")
    assert (run.path / "spec.yaml").read_text() == SPEC


def test_the_same_spec_resumes(tmp_path: Path, loaded: LoadedSpec) -> None:
    with opened(tmp_path, loaded) as run:
        run.plan.write_text("{}")
        created = run.identity["created"]
    with opened(tmp_path, loaded) as run:
        assert run.identity["created"] == created
        assert len(run.identity["submissions"]) == 2
        assert run.plan.exists()


def test_more_trials_resources_and_output_extend_and_the_stored_spec_follows(tmp_path: Path, loaded: LoadedSpec) -> None:
    with opened(tmp_path, loaded) as run:
        run.plan.write_text("{}")
    longer = SPEC.replace("trials: 4", "trials: 9") + "resources: {gangs: 2}\noutput: elsewhere\n"
    with opened(tmp_path, written(tmp_path, longer)) as run:
        assert (run.path / "spec.yaml").read_text() == longer
        assert run.identity["values"]["search"]["trials"] == 9


def test_another_spec_is_refused_with_the_difference_and_nothing_changes(tmp_path: Path, loaded: LoadedSpec) -> None:
    with opened(tmp_path, loaded) as run:
        run.plan.write_text("{}")
    before = snapshot(run.path)
    other = SPEC.replace("eval: 0.2", "eval: 0.3").replace("trials: 4", "trials: 9") + "train: {epochs: 3}\n"
    with pytest.raises(RunConflictError) as caught:
        opened(tmp_path, written(tmp_path, other))
    message = str(caught.value)
    assert "data.eval: 0.2 -> 0.3" in message
    assert "train.epochs: 2.0 -> 3.0" in message or "train.epochs: 2 -> 3" in message
    assert "search.trials" not in message
    assert caught.value.exit_code == 2
    after = snapshot(run.path)
    assert {name: after[name] for name in before if name != ".lock"} == {n: b for n, b in before.items() if n != ".lock"}
    assert after.keys() == before.keys()


def test_a_run_in_which_nothing_was_planned_may_be_another_one(tmp_path: Path, loaded: LoadedSpec) -> None:
    opened(tmp_path, loaded).close()
    with opened(tmp_path, written(tmp_path, SPEC.replace("eval: 0.2", "eval: 0.3"))) as run:
        assert len(run.identity["submissions"]) == 1


@pytest.mark.parametrize(
    "foreign", [{"thesis.tex": "x"}, {"run.json": '{"somebody": "else"}'}, {"run.json": "[]"}, {"sub/keep": "x"}]
)
def test_a_folder_that_is_no_run_is_refused_and_nothing_is_touched(
    tmp_path: Path, loaded: LoadedSpec, foreign: dict[str, str]
) -> None:
    folder = tmp_path / "runs" / "tutor"
    for name, content in foreign.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    before = snapshot(folder)
    with pytest.raises(RunConflictError, match="tutor"):
        opened(tmp_path, loaded)
    assert snapshot(folder) == before


def test_a_file_in_the_runs_place_is_refused(tmp_path: Path, loaded: LoadedSpec) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tutor").write_text("x")
    with pytest.raises(RunConflictError, match="a file is in the place of"):
        opened(tmp_path, loaded)


def test_a_damaged_run_json_is_named(tmp_path: Path, loaded: LoadedSpec) -> None:
    opened(tmp_path, loaded).close()
    (tmp_path / "runs" / "tutor" / "run.json").write_text('{"name": ')
    with pytest.raises(IntegrityError, match=r"run\.json"):
        opened(tmp_path, loaded)


def test_a_driver_killed_while_it_opens_leaves_a_folder_that_opens(tmp_path: Path, loaded: LoadedSpec, killed_everywhere) -> None:
    folder = tmp_path / "runs" / "tutor"

    def reset() -> None:
        for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else []:
            path.unlink()

    for where in killed_everywhere(lambda: opened(tmp_path, loaded).close(), reset):
        with opened(tmp_path, loaded) as run:
            assert run.identity["name"] == "tutor", where
        assert sorted(entry.name for entry in folder.iterdir()) == [".lock", "run.json", "spec.yaml"], where


HOLD = """
import sys, time
from pathlib import Path
from orchestrator.spec import load_spec, spec_sha256
from orchestrator.run.directory import RunDirectory
loaded = load_spec(sys.argv[1])
run = RunDirectory.open(Path(sys.argv[2]), loaded.spec.name, loaded, spec_sha256(loaded.spec, "sweep"))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_driver_is_refused_until_the_first_one_dies(tmp_path: Path, loaded: LoadedSpec) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(loaded.path), str(tmp_path / "runs")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunConflictError) as caught:
            opened(tmp_path, loaded)
        assert f"process {holder.pid} on host {os.uname().nodename} is already running this run" in str(caught.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        opened(tmp_path, loaded).close()
    finally:
        holder.kill()


def test_the_same_process_does_not_open_a_run_twice(tmp_path: Path, loaded: LoadedSpec) -> None:
    with opened(tmp_path, loaded), pytest.raises(RunConflictError, match=str(os.getpid())):
        opened(tmp_path, loaded)
    opened(tmp_path, loaded).close()


def test_a_refused_spec_gives_the_lock_back(tmp_path: Path, loaded: LoadedSpec) -> None:
    with opened(tmp_path, loaded) as run:
        run.plan.write_text("{}")
    with pytest.raises(RunConflictError, match="difference"):
        opened(tmp_path, written(tmp_path, SPEC.replace("eval: 0.2", "eval: 0.3")))
    opened(tmp_path, written(tmp_path, SPEC)).close()


def test_events_are_lines_and_other_versions_are_one(tmp_path: Path, loaded: LoadedSpec) -> None:
    with opened(tmp_path, loaded) as run:
        run.event("gang_replaced", gang=1, reason="killed")
        identity = run.identity
    (event,) = read_jsonl(run.path / "events.jsonl")
    assert (event["kind"], event["gang"], event["reason"]) == ("gang_replaced", 1, "killed")
    identity["versions"]["torch"] = "1.0.0"
    (run.path / "run.json").write_text(json.dumps(identity))
    opened(tmp_path, loaded).close()
    event = read_jsonl(run.path / "events.jsonl")[-1]
    assert event["kind"] == "versions_changed"
    assert event["changes"] == [f"torch: 1.0.0 -> {versions()['torch']}"]
