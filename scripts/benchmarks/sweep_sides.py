"""The two sides' whole sweeps: run them, or read what they left, as figures that can be compared."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gangs import pauses_between_trials, read_results
from sweep_points import Sets, Task, write_spec

from orchestrator.plan.values import RunPlan
from orchestrator.report.timeline import NAMES, seconds_by_kind, submissions_of
from orchestrator.run.reader import RunRecords, read_run
from orchestrator.store import read_json
from orchestrator.work.results import RungResult

GEMM_SIZE = 512
GEMM_REPEATS = 400


@dataclass(frozen=True)
class Side:
    """A whole sweep. Seconds are counted from when it was started."""

    search_seconds: float
    """Until every trial had ended."""
    best_loss: float
    losses: tuple[tuple[float, float], ...]
    """(seconds, eval loss) of every rung, in order."""
    trained: tuple[tuple[str, int], ...]
    """(layers, steps trained) of every trial."""
    between_trials: tuple[float, ...]
    """Seconds without training between two trials on one place."""
    details: dict[str, Any]

    def seconds_to(self, loss: float) -> float | None:
        """When a rung first was at least as good."""
        return next((seconds for seconds, found in self.losses if found <= loss), None)


class NotComparableError(Exception):
    """The given results have other settings, or are not measurements."""


def gemm_gflops() -> float:
    """The machine's speed: a fixed loop of float32 products on one thread. It tells a busy machine from a quiet one."""
    torch.set_num_threads(1)
    left, right = torch.randn(GEMM_SIZE, GEMM_SIZE), torch.randn(GEMM_SIZE, GEMM_SIZE)
    torch.mm(left, right)
    started = time.perf_counter()
    for _ in range(GEMM_REPEATS):
        torch.mm(left, right)
    return 2 * GEMM_SIZE**3 * GEMM_REPEATS / (time.perf_counter() - started) / 1e9


def run_ours(task: Task, folder: Path) -> Path:
    """Our sweep, an ordinary job; its run folder."""
    from orchestrator.report import open_view
    from orchestrator.runtime import run_sweep

    return run_sweep(write_spec(task, folder), view=open_view(stream=sys.stderr)).run_folder


def read_ours(run: Path) -> Side:
    """From a run folder.

    Raises:
        NotComparableError: it was submitted several times.
    """
    submitted, *more = read_json(run / "run.json")["submissions"]
    if more:
        raise NotComparableError(f"{run} was submitted {1 + len(more)} times: its wall time is no measurement")
    plan = RunPlan.model_validate(read_json(run / "plan.json"))
    records = read_run(run)
    searched = read_results(run)
    layers = {trial.trial_id: trial.layers for trial in records.sweep.trials} if records.sweep else {}
    last = {result.trial_id: result for result in sorted(searched, key=lambda result: result.step)}
    finals = [result.eval_loss for result in last.values() if result.eval_loss is not None]
    scored = [(result.finished_at - submitted, result.eval_loss) for result in searched if result.eval_loss is not None]
    sweep = records.sweep
    return Side(
        # The control `head` is trained beside the trials; the search is over when it is, too.
        search_seconds=max(result.finished_at for result in records.results) - submitted,
        best_loss=min(finals),
        losses=tuple(sorted(scored)),
        trained=tuple((layers[trial_id], result.step) for trial_id, result in last.items()),
        between_trials=tuple(pauses_between_trials(searched)),
        details={
            "gang_seconds": _gang_seconds(records, submitted),
            "seconds_to_bundle": sweep.finished_at - submitted if sweep and sweep.finished_at else None,
            "seconds_to_first_step": _first_step(searched, submitted),
            "rung_steps": list(plan.search.rung_steps) if plan.search else [],
            "trials": _trials(searched, layers),
        },
    )


def _gang_seconds(records: RunRecords, submitted: float) -> dict[str, float]:
    """Return the time of our sweep by activity: of all gangs together, and before the first one started."""
    submissions = submissions_of(records)
    before = min((span.start for part in submissions for span in part.spans), default=submitted) - submitted
    found = {NAMES[kind]: seconds for kind, seconds in seconds_by_kind(submissions).items()}
    return {"before the gangs start (wall)": before} | found


def _first_step(results: list[RungResult], submitted: float) -> float:
    first = min(results, key=lambda result: result.started_at)
    return first.started_at - submitted + first.train_seconds / max(1, first.step)


def _trials(results: list[RungResult], layers: dict[str, str]) -> list[dict[str, Any]]:
    ids = sorted({result.trial_id for result in results})
    return [
        {
            "layers": layers[trial_id],
            "rungs": [
                {"step": result.step, "eval_loss": result.eval_loss, "seconds": result.finished_at - result.started_at}
                for result in sorted(results, key=lambda result: result.step)
                if result.trial_id == trial_id
            ],
        }
        for trial_id in ids
    ]


def run_stock(task: Task, out: Path) -> None:
    """The stock sweep in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("stock_sweep.py")), "--out", str(out)]
    command += ["--base", str(task.base), "--data", str(task.train), "--rows", str(task.rows), "--trials", str(task.trials)]
    command += ["--epochs", str(task.epochs), "--concurrent", str(task.concurrent)]
    subprocess.run(command + ([] if task.early_stopping else ["--no-early-stopping"]), check=True)


def read_stock(file: Path, task: Task, sets: Sets) -> Side:
    """From stock_sweep's JSON.

    Raises:
        NotComparableError: it is of other points, rows, epochs or rungs, or its trials failed.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["settings"] != json.loads(json.dumps(task.settings())) or found["rung_steps"] != list(sets.rungs):
        raise NotComparableError(f"{file} is of other settings: {found['settings']}, rungs {found['rung_steps']}")
    if found["errors"] or found["best"] is None:
        raise NotComparableError(f"{file}: trials of the stock sweep failed: {found['errors'][:3]}")
    trials = found["trials"]
    losses = [(rung["finished_at"] - found["started_at"], rung["eval_loss"]) for trial in trials for rung in trial["rungs"]]
    return Side(
        search_seconds=found["wall_seconds"],
        best_loss=found["best"]["rungs"][-1]["eval_loss"],
        losses=tuple(sorted(losses)),
        trained=tuple((trial["layers"], trial["rungs"][-1]["step"]) for trial in trials),
        between_trials=tuple(trial["seconds_to_first_step"] for trial in trials),
        details={"trials": trials},
    )
