"""The jobs through `ray job submit`, on a real head that `cluster/local` started and that asks for a token."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.samples import SAMPLE_DATA
from orchestrator.store import check_folder, read_json, read_jsonl
from orchestrator.units import MIB

from .runs import training_trials, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
JOB_TIMEOUT_S = 600
ROWS = {"train": 120, "eval": 16, "test": 12, "retain": 8}
SPEC = """\
name: submitted
base: {model: sample}
task: completion
data: {train: train.jsonl, eval: eval.jsonl, test: test.jsonl, retain: retain.jsonl, max_tokens: 64, retain_tokens: 512}
train: {epochs: 1, tokens_per_step: 512}
search:
  layers: ["last:1", "last:2"]
  learning_rate: {lora: [5e-3, 1e-2]}
  lora_rank: [4]
  trials: 2
  algorithm: random
  scheduler: none
  repeats: 1
  max_forgetting: 3.0
resources: {gangs: 1, ranks_per_gang: 1}
output: runs
"""


@dataclass(frozen=True)
class Head:
    """A running head, seen from a client with its token."""

    environment: dict[str, str]
    home: Path
    session: Path
    """Ray's own folder."""

    @property
    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    def ray(self, *arguments: str | Path, cwd: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """`ray ...` with the client's environment; a change to None takes a variable away."""
        environment = {name: value for name, value in {**self.environment, **changes}.items() if value is not None}
        command = ["ray", *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=JOB_TIMEOUT_S, check=False
        )

    def submit(self, working_dir: Path, *entrypoint: str | Path) -> Job:
        """Submit and wait. The client's exit code is not the job's, so the job's own record is read."""
        answer = self.ray("job", "submit", "--working-dir", ".", "--", *entrypoint, cwd=working_dir)
        found = re.search(r"Job '(\S+)' submitted", answer.stdout)
        assert found, answer.stdout + answer.stderr
        record = json.loads(self.get(f"/api/jobs/{found[1]}"))
        logs = json.loads(self.get(f"/api/jobs/{found[1]}/logs"))["logs"]
        return Job(record["status"], record["message"], re.sub(r"\x1b\[[0-9;]*m", "", logs), answer.returncode)

    def get(self, path: str, token: str | None = None) -> str:
        """Ask the Jobs API; `token` instead of the right one, empty for none."""
        token = self.token if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.environment["RAY_API_SERVER_ADDRESS"] + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()


@dataclass(frozen=True)
class Job:
    status: str
    message: str
    logs: str
    client_exit_code: int

    @property
    def last_lines(self) -> list[str]:
        """What Ray's job view shows of a failed job."""
        return [line for line in self.logs.splitlines() if line.strip()][-10:]


def processes_with(marker: str) -> list[int]:
    """Living processes that have `marker` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not zombie and marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Head]:
    home, state = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cluster")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CLUSTER_LOCAL_DIR": str(state),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def local(*arguments: str) -> str:
        answer = subprocess.run([repository / "cluster" / "local", *arguments], env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    exports = local("up", "--num-cpus", "2")
    try:
        client = dict(re.findall(r"^export (\w+)=(.*)$", exports, re.MULTILINE))
        session = Path((state / "scratch").read_text().strip())
        yield Head(environment | client, home, session)
    finally:
        local("down")
    assert processes_with(str(state)) == []
    assert not session.exists()
    assert [entry.name for entry in state.iterdir()] == ["ray.log"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a spec and a cut of the sample's data."""
    for name, count in ROWS.items():
        lines = (SAMPLE_DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:count]))
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def test_the_token_lies_in_a_file_for_its_owner_alone(head: Head) -> None:
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(head.token) == 64


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_who_has_no_token_is_refused(head: Head, project: Path, token: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        head.get("/api/jobs/", token)
    assert caught.value.code in (401, 403)
    before = json.loads(head.get("/api/jobs/"))
    answer = head.ray(
        "job", "submit", "--", "true", cwd=project, RAY_AUTH_MODE="token" if token else None, RAY_AUTH_TOKEN_PATH=None,
        RAY_AUTH_TOKEN=token or None,
    )  # fmt: skip
    assert answer.returncode != 0
    assert "AuthenticationError" in answer.stderr
    assert len(json.loads(head.get("/api/jobs/"))) == len(before)


@pytest.mark.parametrize(("mode", "token"), [("token", "0" * 64), ("disabled", "")], ids=["another token", "no token"])
def test_a_driver_with_a_wrong_token_ends_in_words(head: Head, project: Path, mode: str, token: str) -> None:
    environment = {**head.environment, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token}
    del environment["RAY_AUTH_TOKEN_PATH"]
    begun = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-m", "jobs.sweep", project / "spec.yaml"],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert time.monotonic() - begun < 60
    assert answer.returncode == 2, answer.stderr
    last = [line for line in answer.stderr.splitlines() if line.strip()][-2:]
    assert last[-1].startswith("  to do: ")
    assert "RAY_AUTH_TOKEN" in last[-1]
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_a_job_that_is_stopped_says_how_to_go_on_and_leaves_nothing(head: Head, project: Path) -> None:
    (project / "spec.yaml").write_text(SPEC.replace("name: submitted", "name: stopped").replace("epochs: 1", "epochs: 50"))
    run = project / "runs" / "stopped"
    submitted = head.ray(
        "job", "submit", "--no-wait", "--submission-id", "to-be-stopped", "--working-dir", ".", "--",
        "python", "-m", "jobs.sweep", project / "spec.yaml", "--output", run.parent,
        cwd=project,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: training_trials(run))
    assert ranks_of(head)
    begun = time.monotonic()
    stopped = head.ray("job", "stop", "to-be-stopped", cwd=project)
    assert stopped.returncode == 0, stopped.stderr
    assert time.monotonic() - begun < 30
    assert json.loads(head.get("/api/jobs/to-be-stopped"))["status"] == "STOPPED"
    logs = json.loads(head.get("/api/jobs/to-be-stopped/logs"))["logs"]
    assert "stopped by SIGTERM; submit the same spec again to continue from what is on disk" in logs
    assert "Traceback" not in logs
    wait_until(lambda: not ranks_of(head))


def ranks_of(head: Head) -> list[int]:
    """Living processes of gangs on this head."""
    found = []
    for pid in processes_with(str(head.home)):
        with suppress(OSError):  # it has just ended
            if b"RankActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_a_sweep_that_is_submitted_ends_with_a_bundle_and_a_report(head: Head, project: Path, repository: Path) -> None:
    runs = project / "kept"
    job = head.submit(repository, "python", "-m", "jobs.sweep", project / "spec.yaml", "--output", runs)
    assert (job.status, job.client_exit_code) == ("SUCCEEDED", 0), job.logs
    run = runs / "submitted"
    sweep = read_json(run / "sweep.json")
    states = {trial["trial_id"]: trial["state"] for trial in sweep["trials"]}
    assert {"none", "head"} < states.keys()
    assert len(states) == 4
    assert sweep["winner_id"] in states
    assert sweep["base_loads"] == 1
    assert check_folder(run / "bundle").num_bytes > 1_000_000
    assert read_json(run / "transfer.json")["verdict"] is not None
    assert "<html" in (run / "report.html").read_text()
    assert (run / "plan.json").exists()
    assert str(run / "bundle") in job.logs
    assert "\x1b[" not in json.loads(head.get("/api/jobs/"))[-1]["message"]
    assert {"spec.yaml", "run.json", "events.jsonl", "trials", "data"} <= {entry.name for entry in run.iterdir()}
    assert read_jsonl(run / "events.jsonl") is not None
    assert_upload_is_small(head)


def assert_upload_is_small(head: Head) -> None:
    uploads = head.session / "session_latest" / "runtime_resources" / "working_dir_files"
    (upload,) = (jobs.parent for jobs in uploads.glob("*/jobs"))
    names = {entry.name for entry in upload.iterdir()}
    assert {"orchestrator", "jobs", "cluster"} <= names
    assert not names & {".git", ".venv", "runs", "tests", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    assert sum(file.stat().st_size for file in upload.rglob("*") if file.is_file()) < 64 * MIB


def test_a_broken_spec_fails_the_job_with_the_line_to_mend_last(head: Head, project: Path) -> None:
    (project / "spec.yaml").write_text(SPEC.replace("trials: 2", "trails: 2"))
    job = head.submit(project, "python", "-m", "jobs.sweep", "spec.yaml")
    assert job.status == "FAILED"
    assert "exit code 2" in job.message
    assert job.client_exit_code != 0
    last = "\n".join(job.last_lines)
    line = SPEC[: SPEC.index("trials: 2")].count("\n") + 1
    assert f"spec.yaml:{line}:3: search.trails: unknown key (did you mean trials?)" in last
    assert job.last_lines[-1].startswith("  to do: ")
    assert job.last_lines[-1] in job.message
    assert not (head.home / "orchestrator-runs").exists()


def test_a_relative_output_leaves_the_upload_and_bad_data_is_named(head: Head, project: Path) -> None:
    with (project / "train.jsonl").open("a") as file:
        file.write('{"prompt": "cut off\n')
    job = head.submit(project, "python", "-m", "jobs.sweep", "spec.yaml")
    assert job.status == "FAILED"
    assert "exit code 2" in job.message
    last = "\n".join(job.last_lines)
    assert "malformed JSON" in last
    assert f"train.jsonl:{ROWS['train'] + 1}" in last
    assert "data.skip_bad_rows" in job.last_lines[-1]
    run = head.home / "orchestrator-runs" / "submitted"
    assert read_json(run / "run.json")["name"] == "submitted"
    assert f"the run goes to {run.parent}" in job.logs
    shutil.rmtree(run.parent)


def test_no_job_shows_the_token(head: Head) -> None:
    jobs: list[dict[str, Any]] = json.loads(head.get("/api/jobs/"))
    assert jobs
    shown = [head.get("/api/jobs/"), *(head.get(f"/api/jobs/{job['submission_id']}/logs") for job in jobs)]
    assert not [text for text in shown if head.token in text]
    commands = subprocess.run(["ps", "axww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert head.token not in commands
