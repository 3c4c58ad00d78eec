"""The task that both sides of the sweep benchmark search: the same points, token ids, labels, steps and rungs.

Sixteen points: four rates for each of four choices of layers, LoRA of rank 8 (alpha 16) on every linear layer of the
chosen blocks. Rates are log-uniform in [1e-4, 1e-2] by a seeded generator, and so is the order of the points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from orchestrator.anatomy import read_anatomy
from orchestrator.data import data_size, prepare_data
from orchestrator.plan.schedule import REDUCTION_FACTOR, rung_steps, total_steps
from orchestrator.spec import LoadedSpec, load_spec

LAYERS = ("last:1", "last:2", "last:4", "all")
RATES = (1e-4, 1e-2)
RATES_PER_CHOICE = 4
SEED = 0
LORA_RANK = 8
LORA_ALPHA = 16
HELD_OUT = 0.1
TEST_ROWS = 20
"""The test set is read at the end of our run alone, for the verdict; it costs next to nothing."""


class Point(NamedTuple):
    """A trial of the search."""

    layers: str
    learning_rate: float


def all_points() -> list[Point]:
    """The sixteen points, the same whenever and wherever they are asked for."""
    draw = random.Random(SEED)
    low, high = (math.log(rate) for rate in RATES)
    points = [Point(layers, float(f"{math.exp(draw.uniform(low, high)):.3g}")) for layers in LAYERS * RATES_PER_CHOICE]
    draw.shuffle(points)
    return points


@dataclass(frozen=True)
class Task:
    """Search task and its size."""

    base: Path
    train: Path
    """JSONL with columns question and answer."""
    rows: int = 1000
    """Rows of the file that are used; the last tenth of them is held out for evaluation."""
    trials: int = 16
    epochs: float = 2.0
    early_stopping: bool = True
    concurrent: int = 2
    """Trials at a time, of one thread each."""
    our_rungs: int = 3
    """Rungs of our own side's early stopping; the other side has three, each of which costs it a start."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Task:
        return cls(
            base=options.base.resolve(),
            train=options.data.resolve(),
            rows=options.rows,
            trials=options.trials,
            epochs=options.epochs,
            early_stopping=not options.no_early_stopping,
            concurrent=options.concurrent,
            our_rungs=options.our_rungs,
        )

    @property
    def points(self) -> list[Point]:
        return all_points()[: self.trials]

    def settings(self) -> dict[str, object]:
        """Settings that must be equal in two results that are compared."""
        return {
            "rows": self.rows,
            "epochs": self.epochs,
            "early_stopping": self.early_stopping,
            "concurrent": self.concurrent,
            "points": [list(point) for point in self.points],
        }


@dataclass(frozen=True)
class Sets:
    """The tokenised sets, and the steps at which trials are compared."""

    train: Path
    eval: Path
    num_train: int
    steps_per_epoch: int
    rungs: tuple[int, ...]
    reduction_factor: int = REDUCTION_FACTOR


def add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with columns question and answer (gsm8k's train file)")
    parser.add_argument("--rows", type=int, default=Task.rows)
    parser.add_argument("--trials", type=int, default=Task.trials)
    parser.add_argument("--epochs", type=float, default=Task.epochs)
    parser.add_argument("--concurrent", type=int, default=Task.concurrent, help="trials at a time, of one thread each")
    parser.add_argument("--our-rungs", type=int, default=Task.our_rungs, help="how often our side compares a trial")
    parser.add_argument("--no-early-stopping", action="store_true", help="every trial runs to its end")


def pin(task: Task) -> None:
    """Leave this process and all that it starts as many cores as there are trials at a time: either side then has one thread a
    trial, whatever the machine has."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.concurrent])


def write_spec(task: Task, folder: Path) -> LoadedSpec:
    """The task as an ordinary spec, with its data beside it. Runs go to `folder`/runs."""
    lines = task.train.read_text(encoding="utf-8").splitlines()[: task.rows + TEST_ROWS]
    held_out = max(1, round(HELD_OUT * task.rows))
    cuts = {"train": (0, task.rows - held_out), "eval": (task.rows - held_out, task.rows), "test": (task.rows, None)}
    for name, (start, stop) in cuts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines[start:stop]) + "\n", encoding="utf-8")
    spec = {
        "name": "sweep",
        "base": {"model": str(task.base)},
        "task": "completion",
        "data": {
            **{name: f"{name}.jsonl" for name in cuts},
            "columns": {"prompt": "question", "completion": "answer"},
            "max_tokens": 512,
        },
        "train": {"epochs": task.epochs, "tokens_per_step": 4096, "warmup": 0.05, "schedule": "cosine", "seed": SEED},
        "search": {
            "algorithm": "fixed",
            "points": [
                {"layers": point.layers, "learning_rate": point.learning_rate, "lora_rank": LORA_RANK} for point in task.points
            ],
            "scheduler": "asha" if task.early_stopping else "none",
            "rungs": task.our_rungs,
        },
        "resources": {"gangs": task.concurrent, "ranks_per_gang": 1, "accelerator": "cpu"},
        "output": "runs",
    }
    file = folder / "spec.yaml"
    file.write_text(json.dumps(spec, indent=1), encoding="utf-8")  # JSON is YAML
    return load_spec(file)


def make_sets(task: Task, folder: Path) -> Sets:
    """Tokenise as our own runs do. With or without early stopping, losses are looked at after the same steps."""
    loaded = write_spec(task, folder)
    anatomy = read_anatomy(task.base, need_weights=True)
    summary = prepare_data(loaded, Path(anatomy.folder), folder / "sets")
    size = data_size(summary, loaded.spec, folder / "sets")
    rungs = rung_steps(total_steps(loaded.spec, size), scheduler="asha" if task.early_stopping else "none")
    return Sets(folder / "sets" / "train.npz", folder / "sets" / "eval.npz", size.train_documents, size.steps_per_epoch, rungs)
