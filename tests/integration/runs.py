"""Small real runs: tiny data cut from the samples, jobs submitted in this process or in one of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import pytest

from orchestrator.cli.commands import main
from orchestrator.run.ledger import Ledger, TrialEntry
from orchestrator.samples import SAMPLE_DATA
from orchestrator.store import read_json, read_jsonl
from orchestrator.transfer.records import SweepResult, TransferReport
from orchestrator.work.results import RungResult

Job = Literal["sweep", "finetune"]
Found = TypeVar("Found")

ROWS = {"train": 240, "eval": 20, "test": 20, "retain": 2}
TIMEOUT_S = 400
"""For whatever is waited for: an upper bound for a busy machine, no expectation."""
NOWHERE = "127.0.0.1:1"
"""No Ray answers there: a job that needs one fails."""

TINY: dict[str, Any] = {
    "base": {"model": "sample"},
    "task": "completion",
    "data": {
        **{split: f"{split}.jsonl" for split in ROWS},
        "max_tokens": 64,
        "retain_tokens": 500,
    },
    "train": {"epochs": 1, "tokens_per_step": 512},
    "output": "runs",
}


# -- what is submitted ------------------------------------------------------------------------------------------------


def write_spec(folder: Path, name: str, **sections: Any) -> Path:
    """A spec over the first rows of the samples, which are written beside it; `sections` are laid over `TINY`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_rows in ROWS.items():
        rows = (SAMPLE_DATA / f"{split}.jsonl").read_text().splitlines(keepends=True)[:num_rows]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    values: dict[str, Any] = {**TINY, "name": name}
    for section, given in sections.items():
        known = values.get(section)
        values[section] = {**known, **given} if isinstance(known, dict) else given
    if "search" in values:  # the rows are few, and what is looked at is the search
        values["search"] = {"repeats": 1, **values["search"]}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values, indent=2))
    return path


def run_folder(spec: Path) -> Path:
    return spec.parent / "runs" / json.loads(spec.read_text())["name"]


# -- submitting, and what may come between ---------------------------------------------------------------------------


def submit(job: Job, spec: Path) -> int:
    """Run a job in this process, on the Ray that stands; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([job, str(spec)])
    return int(ended.value.code or 0)


def start(job: Job, spec: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a job in a process of its own; what it says goes to a file beside the spec."""
    with spec.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{job}", str(spec)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )


def kill_driver(driver: subprocess.Popen[bytes]) -> list[str]:
    """SIGKILL a driver; names of its descendants that stayed alive, which are ended then.

    Ray's two agents hold nothing and end by themselves a minute later; they are not waited for.
    """
    descendants = psutil.Process(driver.pid).children(recursive=True)
    agents = [process for process in descendants if process.name().endswith("Agent")]
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs([process for process in descendants if process not in agents], timeout=60)
    names = [process.name() for process in alive]
    for process in (*alive, *agents):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return names


def kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def wait_until(found: Callable[[], Found | None], *, while_alive: subprocess.Popen[bytes] | None = None) -> Found:
    """Poll until `found` gives something."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        assert while_alive is None or while_alive.poll() is None, "the job ended before the moment that was waited for"
        time.sleep(0.02)
    raise TimeoutError(f"{found.__name__} gave nothing in {TIMEOUT_S} s")


@contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Do something from another thread while the block runs; its failure is the test's."""
    with ThreadPoolExecutor(1) as pool:
        acted = pool.submit(action)
        yield
        acted.result(TIMEOUT_S)


@contextmanager
def mapped_libraries(names: tuple[str, ...]) -> Iterator[dict[str, set[str]]]:
    """While the block runs, collect which of the libraries each kind of Ray process below this one has mapped.

    A library counts by its shared objects. Keys are the processes' titles up to the method, such as `ray::Exchange`.
    """
    found: dict[str, set[str]] = {}
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(0.2):
            processes: list[psutil.Process] = []
            with suppress(psutil.Error):  # one of them may end while they are listed
                processes = psutil.Process().children(recursive=True)
            for process in processes:
                with suppress(psutil.Error, OSError):
                    title = " ".join(process.cmdline()).partition(".")[0]
                    if title.startswith("ray::"):
                        maps = Path(f"/proc/{process.pid}/maps").read_text()
                        found.setdefault(title, set()).update(name for name in names if f"/{name}/" in maps)

    with meanwhile(collect):
        try:
            yield found
        finally:
            ended.set()


# -- what a run left ---------------------------------------------------------------------------------------------------


def sweep_of(run: Path) -> SweepResult:
    return SweepResult.model_validate(read_json(run / "sweep.json"))


def transfer_of(run: Path) -> TransferReport:
    return TransferReport.model_validate(read_json(run / "transfer.json"))


def trials_of(run: Path) -> list[TrialEntry]:
    """The searched trials as they stand on disk now."""
    return [entry for entry in Ledger(run / "trials").entries() if entry.trial.control is None]


def result_of(run: Path, trial_id: str) -> RungResult:
    """A trial's last result."""
    entry = Ledger(run / "trials").get(trial_id)
    assert entry is not None
    return entry.results[-1]


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    events = run / "events.jsonl"
    return [event for event in read_jsonl(events) if event["kind"] == kind] if events.exists() else []


def losses_in(folder: Path) -> list[str]:
    """The exact loss of every step."""
    return [line["loss_hex"] for line in read_jsonl(folder / "steps.jsonl")]


def losses_of(run: Path) -> dict[str, list[str]]:
    """The exact losses of every searched trial."""
    return {entry.trial.trial_id: losses_in(run / "trials" / entry.trial.trial_id) for entry in trials_of(run)}


Snapshot = dict[str, int]
"""When every file was written, nanoseconds; but not the lock, which everybody takes who looks."""


def snapshot(*folders: Path) -> Snapshot:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file): file.stat().st_mtime_ns for file in files}


def ended_trials(run: Path) -> list[Path]:
    """Folders of the searched trials whose end is on disk."""
    return [run / "trials" / entry.trial.trial_id for entry in trials_of(run) if entry.end is not None]


def training_trials(run: Path) -> list[Path]:
    """Folders of the searched trials that have made a step and have no result yet."""
    folders = [run / "trials" / entry.trial.trial_id for entry in trials_of(run) if not entry.results]
    return [folder for folder in folders if (folder / "steps.jsonl").exists()]
