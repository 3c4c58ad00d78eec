"""What is done to a run from outside: it goes on where it can, ends in plain words where it cannot, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.store import check_folder, read_json

from .runs import TIMEOUT_S, events_of, run_folder, start, sweep_of, training_trials, wait_until, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3 * TIMEOUT_S)]

SEARCH: dict[str, Any] = {
    "layers": ["last:1"],
    "tune": ["lora", "full"],
    "learning_rate": {"lora": [2e-3, 2e-2], "full": [1e-3, 1e-2]},
    "lora_rank": [4],
    "trials": 2,
    "algorithm": "random",
    "scheduler": "none",
    "max_forgetting": 10,
}
SECRETS = {
    name: f"canary-{name.lower()}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD")
} | {"INDEX_URL": "https://user:canary-in-a-url@host/simple"}
IMPATIENT = {"ORCHESTRATOR_PATIENCE": "0.25"}
"""Stopped processes are found after 5 s, those that hang after 15 s."""
LEFTOVERS_S = 60
"""How long the processes of a job may take to end after it; Ray's two agents take longest."""


@pytest.fixture
def session() -> Iterator[Path]:
    """A place for Ray's own files, so that they can be searched; short, for Ray puts sockets there."""
    place = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def folder(tmp_path: Path, session: Path) -> Iterator[Path]:
    """A place for specs and runs; whatever a job leaves running is ended, and a failure."""
    yield tmp_path
    deadline = time.monotonic() + LEFTOVERS_S
    while (left := living(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.5)
    names = [process.name() for process in left]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    assert not names


def living(marker: str) -> list[psutil.Process]:
    """Processes with the marker in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and marker in process.environ().get("FAULT_TEST", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def begin(job: Any, spec: Path, **environment: str) -> subprocess.Popen[bytes]:
    return start(job, spec, FAULT_TEST=str(spec.parent), **IMPATIENT, **environment)


def hit(marker: Path, title: str, number: signal.Signals) -> int:
    """Send a signal to the one process of a job whose command line holds the title; its pid."""

    def found() -> list[psutil.Process]:
        return [process for process in living(str(marker)) if title in " ".join(process.cmdline())]

    target = wait_until(found)[0]
    target.send_signal(number)
    return target.pid


def last_lines(spec: Path, count: int = 3) -> list[str]:
    return [line for line in spec.with_suffix(".log").read_text().splitlines() if line.strip()][-count:]


def ended_in_words(spec: Path, named: str) -> None:
    """The last words are ours: what died, that nothing is lost, how to go on."""
    said = "\n".join(last_lines(spec))
    assert named in said
    assert last_lines(spec)[-1].startswith("  to do: ")
    assert "submit the same spec again" in last_lines(spec)[-1]
    assert "bug in orchestrator" not in said


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stopped_worker_is_replaced_and_no_secret_reaches_a_log(folder: Path, session: Path) -> None:
    spec = write_spec(folder, "stopped", search=SEARCH, train={"epochs": 4}, resources={"gangs": 1, "ranks_per_gang": 1})
    run = run_folder(spec)
    driver = begin("sweep", spec, RAY_TMPDIR=str(session), **SECRETS)
    wait_until(lambda: training_trials(run), while_alive=driver)
    pid = hit(folder, "ray::RankActor", signal.SIGSTOP)
    stopped_at = time.monotonic()
    (died,) = wait_until(lambda: events_of(run, "gang_died"), while_alive=driver)
    print(f"found {time.monotonic() - stopped_at:.1f} s after the fault")
    assert time.monotonic() - stopped_at < 60
    assert f"(pid {pid}) is stopped" in died["message"]
    assert re.search("while (preparing|training)", died["message"])
    wait_until(lambda: is_gone(pid), while_alive=driver)  # the event is written as it is killed
    assert driver.wait(TIMEOUT_S) == 0, last_lines(spec, 20)
    assert sweep_of(run).gangs_replaced == 1
    assert {trial.state for trial in sweep_of(run).searched} == {"finished"}
    check_folder(run / "bundle")
    assert list(session.rglob("*.log")), "Ray's logs are looked at"
    values = [value.encode() for value in SECRETS.values()]
    places = [file for file in (*session.rglob("*"), *run.rglob("*"), spec.with_suffix(".log")) if file.is_file()]
    assert [file for file in places if any(value in file.read_bytes() for value in values)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "number", "named"),
    [
        ("ray::Exchange", signal.SIGKILL, "the exchange"),
        ("ray::Exchange", signal.SIGSTOP, "the exchange"),
        ("raylet/raylet", signal.SIGKILL, "raylet"),
        ("gcs_server", signal.SIGKILL, "control store"),
        ("gcs_server", signal.SIGSTOP, "control store"),
    ],
    ids=["exchange", "exchange stopped", "raylet", "control store", "control store stopped"],
)
def test_what_a_run_cannot_do_without_ends_it_in_words(title: str, number: signal.Signals, named: str, folder: Path) -> None:
    spec = write_spec(folder, "broken", search=SEARCH, train={"epochs": 8}, resources={"gangs": 1, "ranks_per_gang": 1})
    driver = begin("sweep", spec)
    wait_until(lambda: training_trials(run_folder(spec)), while_alive=driver)
    hit(folder, title, number)
    since = time.monotonic()
    assert driver.wait(120) == 4, last_lines(spec, 20)
    print(f"ended {time.monotonic() - since:.1f} s after the fault")
    ended_in_words(spec, named)


@pytest.mark.slow
def test_a_thin_trial_that_is_killed_is_started_again(folder: Path) -> None:
    spec = write_spec(folder, "thin", search=SEARCH, train={"epochs": 4}, resources={"gangs": 1, "ranks_per_gang": 1})
    driver = begin("sweep", spec)
    wait_until(lambda: training_trials(run_folder(spec)), while_alive=driver)
    hit(folder, "ray::ImplicitFunc", signal.SIGKILL)
    assert driver.wait(TIMEOUT_S) == 0, last_lines(spec, 20)
    assert {trial.state for trial in sweep_of(run_folder(spec)).searched} == {"finished"}


@pytest.mark.slow
def test_a_stopped_rank_of_a_refit_is_replaced(folder: Path) -> None:
    """The other rank waits for it in a collective."""
    spec = write_spec(
        folder,
        "refit",
        finetune={"layers": "last:2", "tune": "full", "learning_rate": 2e-3},
        train={"epochs": 4},
        resources={"ranks_per_gang": 2},
    )
    run = run_folder(spec)
    driver = begin("finetune", spec)
    wait_until(lambda: any((run / "refit").glob("checkpoint-*")), while_alive=driver)
    pid = hit(folder, "ray::RayTrainWorker", signal.SIGSTOP)
    since = time.monotonic()
    (hung,) = wait_until(lambda: events_of(run, "hung"), while_alive=driver)
    print(f"found {time.monotonic() - since:.1f} s after the fault")
    assert driver.wait(TIMEOUT_S) == 0, last_lines(spec, 20)
    assert f"(pid {pid}) is stopped" in hung["message"]
    assert read_json(run / "transfer.json")["refit"]["restarts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_driver_that_is_asked_to_end_says_how_to_go_on(number: signal.Signals, code: int, folder: Path) -> None:
    spec = write_spec(folder, "asked", search=SEARCH, train={"epochs": 8}, resources={"gangs": 1, "ranks_per_gang": 1})
    driver = begin("sweep", spec)
    wait_until(lambda: training_trials(run_folder(spec)), while_alive=driver)
    os.kill(driver.pid, number)
    since = time.monotonic()
    assert driver.wait(60) == code, last_lines(spec, 20)
    print(f"ended {time.monotonic() - since:.1f} s after the signal")
    assert "from what is on disk" in last_lines(spec, 1)[0]


@pytest.mark.slow
def test_a_node_that_is_lost_costs_its_gang_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from orchestrator.runtime.cluster import connected

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    search = {**SEARCH, "trials": 4}
    spec = write_spec(folder, "two-nodes", search=search, train={"epochs": 6}, resources={"gangs": 2, "ranks_per_gang": 1})
    run = run_folder(spec)
    try:
        driver = begin("sweep", spec, RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled")
        wait_until(lambda: len(training_trials(run)) == 2, while_alive=driver)
        cluster.remove_node(second, allow_graceful=False)
        since = time.monotonic()
        wait_until(lambda: events_of(run, "gang_died"), while_alive=driver)
        print(f"found {time.monotonic() - since:.1f} s after the fault")
        assert driver.wait(TIMEOUT_S) == 0, last_lines(spec, 20)
        with connected(cluster.address):
            groups = ray.util.placement_group_table().values()
            assert {group["state"] for group in groups} == {"REMOVED"}
            assert ray.available_resources()["CPU"] == 1
    finally:
        cluster.shutdown()
    assert "RpcError" not in events_of(run, "gang_died")[0]["message"]
    assert "state-dump" not in spec.with_suffix(".log").read_text(), "Ray's node managers keep their logs to themselves"
    assert {trial.state for trial in sweep_of(run).searched} == {"finished"}
    assert len(sweep_of(run).searched) == 4
    check_folder(run / "bundle")
