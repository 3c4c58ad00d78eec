"""The jobs that both versions of the code run, and how one version runs them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.comparison.figures import results, trial_label

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = {"train": 120, "eval": 16, "test": 16, "retain": 2}
JOB_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "bitsandbytes", "numpy")
"""Their versions decide whether kept results of a commit still hold."""

DATA: dict[str, Any] = {**{split: f"{split}.jsonl" for split in ROWS}, "max_tokens": 64, "retain_tokens": 400}
TASK: dict[str, Any] = {"base": {"model": "sample"}, "task": "completion", "data": DATA, "output": "runs"}
FIXED: dict[str, Any] = {"algorithm": "fixed", "scheduler": "none", "repeats": 1}
ONE_RANK: dict[str, Any] = {"gangs": 1, "ranks_per_gang": 1, "accelerator": "cpu"}
TWO_RANKS: dict[str, Any] = {**ONE_RANK, "ranks_per_gang": 2}
NUM_FUSED = 4

POINTS: list[dict[str, Any]] = [
    *({"layers": "last:1", "learning_rate": rate, "lora_rank": 4} for rate in (5e-4, 1e-3, 2e-3, 4e-3)),
    {"layers": "all", "learning_rate": 1e-3, "lora_rank": 8},
    {"layers": "all", "learning_rate": 5e-4, "tune": "full"},
    {"layers": "last:2", "learning_rate": 5e-4, "tune": "full"},
    {"layers": "last:2", "learning_rate": 5e-4, "tune": "full", "replay": 0.2, "anchor": {"kind": "ewc", "strength": 30.0}},
    {"layers": "last:4", "learning_rate": 2e-3, "lora_rank": 4},
]
NUM_TRIALS = len(POINTS) - 1
"""The last point is trained by whoever extends the finished sweep."""

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "search": (
        "sweep",
        {
            **TASK,
            # Steps so small that fusing them pays on any machine: gangs measure it.
            "train": {"epochs": 1, "tokens_per_step": 96},
            "search": {**FIXED, "trials": NUM_TRIALS, "points": POINTS},
            "resources": {**ONE_RANK, "max_fused": NUM_FUSED},
        },
    ),
    "nf4": (
        "sweep",
        {
            **TASK,
            "base": {"model": "sample", "quantize": "nf4"},
            "train": {"epochs": 1, "tokens_per_step": 512},
            "search": {
                **FIXED,
                "probe": False,
                "trials": 2,
                "points": [
                    {"layers": "last:2", "learning_rate": 1e-3, "lora_rank": 4},
                    {"layers": "last:1", "learning_rate": 5e-4, "tune": "full"},
                ],
            },
            "resources": {**TWO_RANKS, "zero": 2},
        },
    ),
    "zero3": (
        "finetune",
        {
            **TASK,
            "train": {"epochs": 1, "tokens_per_step": 512},
            "finetune": {"layers": "last:2", "tune": "full", "learning_rate": 5e-4},
            "resources": {**TWO_RANKS, "zero": 3},
        },
    ),
    "classify": (
        "finetune",
        {
            **TASK,
            "task": "classify",
            "data": {
                "train": "shop-messages.csv",
                "eval": 0.2,
                "test": 0.2,
                "columns": {"text": "message", "label": "department"},
                "max_tokens": 64,
            },
            "train": {"epochs": 1, "tokens_per_step": 256},
            "finetune": {"layers": "last:2", "tune": "lora", "learning_rate": 2e-3, "lora_rank": 8},
            "resources": ONE_RANK,
        },
    ),
}
"""Name -> (command, spec). Fixed points, no early stopping, explicit steps: nothing depends on time."""


@dataclass(frozen=True)
class Case:
    """A row of the table: some trials of a job, and what their records must show for the case to be the one it is named for."""

    job: str
    trials: tuple[int, ...]
    shows: Callable[[Path, list[dict[str, Any]]], bool]
    """Check on a run folder and the engine records of these trials."""


def _engines(**expected: Any) -> Callable[[Path, list[dict[str, Any]]], bool]:
    return lambda _, engines: all(engine.get(key) == value for engine in engines for key, value in expected.items())


CASES: dict[str, Case] = {
    "fused": Case("search", (0, 1, 2, 3), lambda _, engines: max(engine.get("fused_trials", 1) for engine in engines) > 1),
    "lora": Case("search", (4,), _engines(executor="torch", ranks=1, trunk_cut=None)),
    "full": Case("search", (5,), _engines(executor="torch", ranks=1, trunk_cut=None)),
    "trunk": Case("search", (6,), lambda _, engines: all(engine.get("trunk_cut") is not None for engine in engines)),
    "replay-ewc": Case("search", (7,), lambda run, _: (run / "data/replay.npz").exists() and (run / "data/fisher").is_dir()),
    "nf4-zero2": Case("nf4", (0, 1), _engines(executor="deepspeed", zero_stage=2, ranks=2)),
    "zero3": Case("zero3", (0,), _engines(executor="deepspeed", zero_stage=3, ranks=2)),
    "classify": Case("classify", (0,), lambda run, _: len(list((run / "bundle").glob("model*.safetensors"))) > 0),
}


class JobFailedError(Exception):
    """A command did not end as it should."""


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder in which it runs the jobs."""

    checkout: Path
    folder: Path

    def spec(self, job: str) -> Path:
        return self.folder / job / f"{job}.yaml"

    def run_folder(self, job: str) -> Path:
        return self.folder / job / "runs" / job

    def check_imports(self) -> None:
        """Raises JobFailedError: the checkout's own code is not the one that Python finds."""
        code = "import jobs, pathlib, orchestrator; print(pathlib.Path(orchestrator.__file__).resolve().parent.parent)"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=self.checkout, env=self._environment(), capture_output=True, text=True
        )
        if found.stdout.strip() != str(self.checkout.resolve()):
            raise JobFailedError(f"Python imports {found.stdout.strip() or found.stderr} instead of {self.checkout.resolve()}")

    def write(self, job: str) -> None:
        """Write the spec of a job and its data, which are those of this repository on both sides."""
        folder = self.folder / job
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in data_files().items():
            (folder / name).write_text(content, encoding="utf-8")
        self.spec(job).write_text(json.dumps({"name": job, **JOBS[job][1]}, indent=2), encoding="utf-8")

    def submit(self, job: str, *options: str) -> float:
        """Run a job to its end; return its seconds.

        Raises:
            JobFailedError: it did not end with 0.
        """
        return self.call(job, "-m", f"jobs.{JOBS[job][0]}", str(self.spec(job)), *options)

    def call(self, job: str, *arguments: str) -> float:
        """Run Python in the checkout; return its seconds. Output goes to a log beside the job's spec.

        Raises:
            JobFailedError: it did not end with 0.
        """
        started = time.monotonic()
        process = self._start(job, *arguments)
        try:
            code: int | str = process.wait(JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = f"nothing within {JOB_TIMEOUT_S} s"
        finally:
            _end(process)
        if code != 0:
            log = self._log(job)
            raise JobFailedError(f"exit code {code} of python {' '.join(arguments)} in {self.checkout}\n{_tail(log)}\nlog: {log}")
        return time.monotonic() - started

    def interrupt(self, job: str, reached: Callable[[Path], bool]) -> bool:
        """Start a job and stop it by SIGTERM as soon as its run folder shows something; return whether it was stopped."""
        process = self._start(job, "-m", f"jobs.{JOBS[job][0]}", str(self.spec(job)))
        deadline = time.monotonic() + JOB_TIMEOUT_S
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if reached(self.run_folder(job)):
                    process.send_signal(signal.SIGTERM)
                    with suppress(subprocess.TimeoutExpired):
                        return process.wait(STOP_TIMEOUT_S) != 0
                time.sleep(0.05)
        finally:
            _end(process)
        return False

    def engines(self, case: Case) -> list[dict[str, Any]]:
        """Return the engine records of a case's trials."""
        run, labels = self.run_folder(case.job), [f"trial {number}" for number in case.trials]
        folders = [folder for folder in (run / "trials").iterdir() if trial_label(folder) in labels]
        return [result["engine"] or {} for folder in folders for result in results(folder)]

    def _start(self, job: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log(job).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.checkout,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, job: str) -> Path:
        return self.folder / job / "log.txt"

    def _environment(self) -> dict[str, str]:
        """The checkout's own code, its own cache, and no Ray but its own."""
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return inherited | {
            "PYTHONPATH": str(self.checkout),
            "ORCHESTRATOR_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_USAGE_STATS_ENABLED": "0",
        }


def data_files() -> dict[str, str]:
    """Return the data of the jobs: file name -> content."""
    samples = REPOSITORY / "orchestrator" / "samples" / "data"
    files = {
        f"{split}.jsonl": "".join((samples / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:number])
        for split, number in ROWS.items()
    }
    messages = REPOSITORY / "jobs" / "specs" / "data" / "shop-messages.csv"
    return files | {messages.name: messages.read_text(encoding="utf-8")}


def cases_key() -> str:
    """Return a hash of all that decides the results of a commit beside its code: specs, data, installed packages."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return hashlib.sha256(json.dumps([JOBS, data_files(), versions, sys.version], sort_keys=True).encode()).hexdigest()[:12]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a job that is still there, with the processes of its session."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
