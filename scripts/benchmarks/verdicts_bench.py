"""Trials of `scripts/bench verdicts`, trained and scored in this process, and what is compared of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import TokenizedSet, data_size, documents_of_steps, prepare_data
from orchestrator.data.sets import build_set, joined
from orchestrator.plan import schedule as steps
from orchestrator.spec import load_spec
from orchestrator.spec.models import Task, Tune
from orchestrator.train import TrainHost
from orchestrator.train.evaluation import Evaluation
from orchestrator.transfer import Comparison, paired_comparison, score
from orchestrator.transfer.records import RungRecord, TrialRecord
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.trial import TrialSpec

MAX_TOKENS = 512
TOKENS_PER_STEP = 1024
NUM_STORED = 3
"""Cuts from the top down at which hidden states are stored: those of head, last:1 and last:2."""

Row = dict[str, str]


@dataclass(frozen=True)
class Point:
    """One configuration, trained for `epochs`."""

    layers: str
    tune: Tune
    rate: float
    epochs: int
    lora_rank: int | None = None


class Bench:
    """A host to train and score on, and its rows: some of `train` are learned, all of `held` are scored."""

    def __init__(self, base: Path, task: Task, columns: Row, train: Sequence[Row], held: Sequence[Row], folder: Path) -> None:
        for name, rows in (("train", train), ("eval", held[:1]), ("test", held[1:])):
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        spec: dict[str, Any] = {
            "name": "verdicts",
            "base": {"model": str(base)},
            "task": task,
            "data": {name: f"{name}.jsonl" for name in ("train", "eval", "test")},
            "train": {"tokens_per_step": TOKENS_PER_STEP},
            "finetune": {"layers": "head", "tune": "full", "learning_rate": 1e-3},
        }
        spec["data"] |= {"columns": columns, "max_tokens": MAX_TOKENS, "long_rows": "truncate_prompt", "test_rows": len(held)}
        (folder / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
        loaded = load_spec(folder / "spec.yaml")
        anatomy = self._anatomy = read_anatomy(base, need_weights=True)
        size = data_size(prepare_data(loaded, Path(anatomy.folder), folder / "sets"), loaded.spec, folder / "sets")
        self._folder = folder
        self._train, first, rest = (TokenizedSet.load(folder / "sets" / f"{name}.npz") for name in ("train", "eval", "test"))
        self._held = joined(first, rest)
        self._held.save(folder / "sets" / "held.npz")
        assert (len(self._train), len(self._held)) == (len(train), len(held)), "rows were dropped"
        self._load = BaseLoad(
            folder=anatomy.folder,
            model_type=anatomy.model_type,
            quantize="none",
            task=task,
            num_classes=size.num_classes,
            class_names=size.class_names,
        )
        self._execution = ExecutionPlan(
            device="cpu",
            ranks=1,
            threads_per_rank=1,
            executor="torch",
            row_tokens=steps.row_tokens(loaded.spec, anatomy, size),
            micro_batch_rows=8,
            pack=steps.packs(loaded.spec),
        )
        cuts = range(anatomy.num_blocks - NUM_STORED + 1, anatomy.num_blocks + 1)
        self._trunk = TrunkPlan(cuts=tuple(cuts), num_bytes=0, folder=str(folder / "trunk"))
        self._host = TrainHost.create(self._load, anatomy, self._execution, 0, 1, None)

    def base(self) -> Scored:
        """The untouched base; a classifier that nobody trained is the class prior."""
        trial = TrialSpec(
            trial_id="none",
            number=-1,
            control="none",
            layers="none",
            tune="full",
            learning_rate=0.0,
            total_steps=0,
            total_tokens=0,
            seed=0,
        )
        return self._scored(trial, str(self._folder / "sets" / "train.npz"))

    def trained(self, point: Point, learned: Sequence[int], seed: int) -> Scored:
        """A trial of the point on these training rows, from its first step to its last."""
        rows = build_set(
            [self._train.document(index) for index in learned], labels=[int(self._train.labels[index]) for index in learned]
        )
        name = f"{point.layers}-{point.tune}-{seed}".replace(":", "")
        file = self._folder / "sets" / f"{name}.npz"
        rows.save(file)
        an_epoch = len(documents_of_steps(rows.offsets, TOKENS_PER_STEP, seed, 0))
        trial = TrialSpec(
            trial_id=name,
            number=seed,
            layers=point.layers,
            tune=point.tune,
            lora_rank=point.lora_rank,
            learning_rate=point.rate,
            total_steps=point.epochs * an_epoch,
            total_tokens=point.epochs * rows.num_tokens,
            seed=seed,
        )
        return self._scored(trial, str(file))

    def _scored(self, trial: TrialSpec, train: str) -> Scored:
        load = self._load
        assignment = TrainRung(
            context=WorkContext(
                settings=TrainSettings(
                    warmup=0.05, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=TOKENS_PER_STEP
                ),
                data=DataPaths(train=train, eval=str(self._folder / "sets" / "held.npz")),
                metric="loss",
                trunk=self._trunk,
            ),
            trial=trial,
            selection=select(
                self._anatomy, trial.layers, trial.tune, trial.lora_rank, task=load.task, num_classes=load.num_classes
            ),
            execution=self._execution,
            folder=str(self._folder / "trials" / trial.trial_id),
            rung=0,
            stop_step=trial.total_steps,
        )
        result = self._host.run_trial(assignment)
        assert result.state == "done", result.reason
        found = Evaluation.load(Path(result.checkpoint or assignment.folder) / "eval.npz")
        wrong = None if found.predictions is None else (found.predictions != self._held.labels).astype(float)
        return Scored(found.loss_sums / found.num_tokens, found.num_tokens.astype(float), wrong)

    def close(self) -> None:
        self._host.close()


@dataclass(frozen=True)
class Scored:
    """A model on n held rows."""

    losses: np.ndarray
    """float64[n]: each row's mean loss."""
    tokens: np.ndarray
    """float64[n]: what weighs it."""
    wrong: np.ndarray | None
    """float64[n]: 1 for a wrong class, 0 for the right one."""

    def against(self, reference: Scored, rows: Sequence[int], seed: int, *, by_answer: bool = False) -> Comparison:
        """Compare two models as a run does."""
        chosen = list(rows)
        if by_answer:
            assert self.wrong is not None
            assert reference.wrong is not None
            return paired_comparison(self.wrong[chosen], reference.wrong[chosen], None, seed, unit="accuracy")
        return paired_comparison(self.losses[chosen], reference.losses[chosen], self.tokens[chosen], seed)

    def record(self, number: int, point: Point | None, rows: Sequence[int]) -> TrialRecord:
        """Return the trial's record as a search that scores its trials on these rows would."""
        chosen = list(rows)
        loss = float(np.average(self.losses[chosen], weights=self.tokens[chosen]))
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
