"""Trials of `scripts/bench verdicts`, trained and scored in this process, and what is compared of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import TokenizedSet, data_size, prepare_data
from orchestrator.data.sets import joined
from orchestrator.plan import steps
from orchestrator.plan.values import (
    Assignment,
    BaseLoad,
    DataPaths,
    DataSize,
    ExecutionPlan,
    TrainSettings,
    TrialSpec,
    TrunkPlan,
)
from orchestrator.spec import load_spec
from orchestrator.spec.models import Task, Tune
from orchestrator.train import TrainHost
from orchestrator.train.evaluation import Evaluation
from orchestrator.transfer import Comparison, paired_comparison, score
from orchestrator.transfer.records import RungRecord, TrialRecord

MAX_TOKENS = 256
NUM_STORED = 3
"""Cuts from the top down at which hidden states are stored: those of head, last:1 and last:2."""

Row = dict[str, str]


@dataclass(frozen=True)
class Point:
    """One configuration, trained for `epochs`."""

    layers: str
    tune: Tune
    rate: float
    epochs: float
    lora_rank: int | None = None


class Bench:
    """Rows of one repetition, prepared, and a host to train and score on; `held` is scored, eval rows first, then test rows."""

    def __init__(self, base: Path, task: Task, columns: Row, rows: dict[str, list[Row]], folder: Path) -> None:
        for name in ("train", "eval", "test"):
            lines = (json.dumps(row, ensure_ascii=False) for row in rows[name])
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        spec: dict[str, Any] = {
            "name": "verdicts",
            "base": {"model": str(base)},
            "task": task,
            "data": {name: f"{name}.jsonl" for name in ("train", "eval", "test")},
            "train": {"epochs": 1, "tokens_per_step": 1024},
            "finetune": {"layers": "head", "tune": "full", "learning_rate": 1e-3},
        }
        spec["data"] |= {"columns": columns, "max_tokens": MAX_TOKENS, "long_rows": "truncate_prompt"}
        (folder / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
        loaded = load_spec(folder / "spec.yaml")
        self._folder = folder
        self._anatomy = read_anatomy(base, need_weights=True)
        summary = prepare_data(loaded, Path(self._anatomy.folder), folder / "sets")
        self._size: DataSize = data_size(summary, loaded.spec, folder / "sets")
        held = [TokenizedSet.load(folder / "sets" / f"{name}.npz") for name in ("eval", "test")]
        joined(*held).save(folder / "sets" / "held.npz")
        self.num_eval = len(held[0])
        self.labels = np.concatenate([part.labels for part in held])
        self._task: Task = task
        self._execution = ExecutionPlan(
            device="cpu",
            ranks=1,
            threads_per_rank=1,
            executor="torch",
            row_tokens=steps.row_tokens(loaded.spec, self._anatomy, self._size),
            micro_batch_rows=8,
            pack=steps.packs(loaded.spec),
        )
        above = range(self._anatomy.num_blocks - NUM_STORED + 1, self._anatomy.num_blocks + 1)
        self._trunk = TrunkPlan(cuts=tuple(above), num_bytes=0, folder=str(folder / "trunk"))
        self._host = self._start()

    def _start(self) -> TrainHost:
        load = BaseLoad(
            folder=self._anatomy.folder,
            model_type=self._anatomy.model_type,
            quantize="none",
            task=self._task,
            num_classes=self._size.num_classes,
            class_names=self._size.class_names,
        )
        return TrainHost.create(load, self._anatomy, self._execution, 0, 1, None)

    def scored(self, point: Point | None, seed: int) -> Scored:
        """A trial of the point from its first step to its last; None is the untouched base."""
        name = f"{point.layers}-{point.tune}-{seed}".replace(":", "") if point else "none"
        chosen = point or Point("none", "full", 0.0, 0)
        num_classes = self._size.num_classes or None
        selection = select(self._anatomy, chosen.layers, chosen.tune, chosen.lora_rank, task=self._task, num_classes=num_classes)
        total_steps = max(1, math.ceil(chosen.epochs * self._size.steps_per_epoch))
        sets = self._folder / "sets"
        assignment = Assignment(
            trial=TrialSpec(
                trial_id=name,
                number=seed,
                control=None if point else "none",
                layers=chosen.layers,
                tune=chosen.tune,
                lora_rank=chosen.lora_rank,
                learning_rate=chosen.rate,
                total_steps=total_steps,
                total_tokens=math.ceil(chosen.epochs * self._size.train_tokens),
                seed=seed,
            ),
            selection=selection,
            execution=self._execution,
            settings=TrainSettings(warmup=0.05, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=1024),
            data=DataPaths(train=str(sets / "train.npz"), eval=str(sets / "held.npz")),
            metric="loss",
            folder=str(self._folder / "trials" / name),
            rung=0,
            stop_step=total_steps if point else 0,
            trunk=self._trunk,
        )
        result = self._host.run(assignment)
        assert result.state == "done", result.reason
        found = Evaluation.load(Path(result.checkpoint or assignment.folder) / "eval.npz")
        wrong = None if found.predictions is None else (found.predictions != self.labels).astype(float)
        return Scored(found.loss_sums / found.num_tokens, found.num_tokens.astype(float), wrong, self.num_eval)

    def close(self) -> None:
        self._host.close()


@dataclass(frozen=True)
class Scored:
    """A model on eval and test rows, eval rows first."""

    losses: np.ndarray
    """float64[n]: each row's mean loss."""
    tokens: np.ndarray
    """float64[n]: what weighs it."""
    wrong: np.ndarray | None
    """float64[n]: 1 for a wrong class, 0 for the right one."""
    num_eval: int

    def against(self, reference: Scored, rows: slice, seed: int, *, by_answer: bool = False) -> Comparison:
        """As a run compares two models."""
        if by_answer:
            assert self.wrong is not None
            assert reference.wrong is not None
            return paired_comparison(self.wrong[rows], reference.wrong[rows], None, seed, unit="accuracy")
        return paired_comparison(self.losses[rows], reference.losses[rows], self.tokens[rows], seed)

    def test(self, count: int, skip: int = 0) -> slice:
        """So many test rows."""
        return slice(self.num_eval + skip, self.num_eval + skip + count)

    def record(self, number: int, point: Point | None, rows: slice) -> TrialRecord:
        """As a search has it that scores its trials on these rows."""
        loss = float(np.average(self.losses[rows], weights=self.tokens[rows]))
        rung = RungRecord(step=1, tokens=1, metric=loss, score=score(loss, False, None, math.inf))
        return TrialRecord(
            trial_id=f"t{number:03d}" if point else "none",
            number=number,
            control=None if point else "none",
            layers=point.layers if point else "none",
            tune=point.tune if point else "full",
            lora_rank=point.lora_rank if point else None,
            learning_rate=point.rate if point else 0.0,
            state="finished",
            rungs=(rung,),
        )
