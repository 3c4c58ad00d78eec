"""Compare `train.tokens_per_step: auto` with the best fixed size, for the same number of documents.

    scripts/bench step_size --corpora FOLDER [--base FOLDER] [--only sample gsm8k banking77] [--rows 300 1500]
                            [--fixed 256 1024 4096 8192] [--rates 1e-3 3e-3 1e-2] [--epochs 2] [--layers last:2] [--out FILE]

Of each corpus so many rows, LoRA of rank 16 on the same layers, the same number of epochs: every size of step is trained at
every learning rate, and counts with its best one, as in a search. The table gives the loss on 300 held rows, and by how much it
lies above the best size's. `sample` is the product's own base and task; the others are learned by `--base`.

Trained and scored by the gang's own host, in this process.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import csv
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.anatomy import read_anatomy, resolve_base, select
from orchestrator.data import data_size, prepare_data
from orchestrator.plan import schedule as steps
from orchestrator.spec import load_spec
from orchestrator.store import append_jsonl
from orchestrator.train import TrainHost
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.trial import TrialSpec

SAMPLES = Path(__file__).resolve().parents[2] / "orchestrator" / "samples" / "data"
HELD = 300
LORA_RANK = 16
SECTIONS: dict[str, dict[str, Any]] = {
    "sample": {"task": "completion", "data": {}},
    "gsm8k": {"task": "completion", "data": {"columns": {"prompt": "question", "completion": "answer"}}},
    "banking77": {"task": "classify", "data": {"columns": {"text": "text", "label": "category"}}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--base", default="sample")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rows", nargs="+", type=int, default=[300, 1500])
    parser.add_argument("--fixed", nargs="+", type=int, default=[256, 1024, 4096, 8192])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--layers", default="last:2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for corpus in options.only:
        base = "sample" if corpus == "sample" else options.base
        for rows in options.rows:
            with tempfile.TemporaryDirectory() as folder:
                for line in compare(corpus, base, rows, options, Path(folder)):
                    print(json.dumps(line), flush=True)
                    if options.out is not None:
                        append_jsonl(options.out, line)


def compare(corpus: str, base: str, rows: int, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A line for each size of step, with its best learning rate."""
    train, held = rows_of(corpus, options.corpora)
    for name, part in (("train", train[:rows]), ("eval", held[:-1][:HELD]), ("test", held[-1:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    bench = Bench(corpus, base, options, folder)
    found: dict[str, tuple[float, float]] = {}
    sizes = {"auto": bench.auto, **{str(size): size for size in options.fixed}}
    for name, size in sizes.items():
        losses = {rate: bench.loss(size, rate) for rate in options.rates}
        found[name] = min((loss, rate) for rate, loss in losses.items())
    best = min(loss for loss, _ in found.values())
    for name, (loss, rate) in found.items():
        counted = {"tokens_per_step": sizes[name], "steps": bench.num_steps(sizes[name])}
        shown = {"loss": round(loss, 4), "above_best": round(loss - best, 4), "rate": rate}
        yield {"corpus": corpus, "rows": rows, "size": name, **counted, **shown}


def rows_of(corpus: str, corpora: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(to learn from, to score) in the files' order; banking77's are sorted by class, so classes are taken by turns."""
    if corpus == "banking77":
        parts: list[list[dict[str, str]]] = []
        for name in ("train", "test"):
            with (corpora / corpus / f"{name}.csv").open(encoding="utf-8", newline="") as file:
                parts.append(list(csv.DictReader(file)))
        return _by_turns(parts[0]), _by_turns(parts[1])
    folder = SAMPLES if corpus == "sample" else corpora / corpus
    names = ("train", "eval") if corpus == "sample" else ("train", "test")
    train, held = ([json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")] for name in names)
    return train, held


def _by_turns(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The first row of each class, then the second of each: any prefix holds all classes alike."""
    count: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        turns.append((count[row["category"]], number))
        count[row["category"]] += 1
    return [rows[number] for _, number in sorted(turns)]


class Bench:
    """One corpus, tokenised, and a host to train and score on."""

    def __init__(self, corpus: str, base: str, options: argparse.Namespace, folder: Path) -> None:
        section = SECTIONS[corpus]
        sets = {name: f"{name}.jsonl" for name in ("train", "eval", "test")}
        spec = {
            "name": corpus,
            "base": {"model": base},
            "task": section["task"],
            "data": {**sets, **section["data"], "max_tokens": 256},
            "train": {"epochs": options.epochs},
        }
        (folder / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
        loaded = load_spec(folder / "spec.yaml")
        self._spec, self._folder, self._layers = loaded.spec, folder, options.layers
        anatomy = self._anatomy = read_anatomy(resolve_base(base, loaded.folder), need_weights=True)
        self._summary = prepare_data(loaded, Path(anatomy.folder), folder / "sets")
        size = data_size(self._summary, self._spec, folder / "sets")
        self.auto, self._classes = size.tokens_per_step, size.num_classes
        self._selection = select(anatomy, self._layers, "lora", LORA_RANK, task=section["task"], num_classes=size.num_classes)
        self._execution = ExecutionPlan(
            device="cpu",
            ranks=1,
            threads_per_rank=1,
            executor="torch",
            row_tokens=256,
            micro_batch_rows=4 if section["task"] != "classify" else 32,
            pack=steps.packs(self._spec),
        )
        load = BaseLoad(
            folder=anatomy.folder,
            model_type=anatomy.model_type,
            quantize="none",
            task=section["task"],
            num_classes=size.num_classes,
            class_names=size.class_names,
        )
        self._trunk = TrunkPlan(cuts=(self._selection.cut,), num_bytes=0, folder=str(folder / "trunk"))
        self._host = TrainHost.create(load, anatomy, self._execution, 0, 1, None)

    def num_steps(self, tokens_per_step: int) -> int:
        return steps.total_steps(self._spec, self._size(tokens_per_step))

    def loss(self, tokens_per_step: int, rate: float) -> float:
        """On the held rows, after the whole training; the class prior's or the base's is no part of it."""
        size = self._size(tokens_per_step)
        trial = TrialSpec(
            trial_id=f"{tokens_per_step}-{rate:g}",
            number=0,
            layers=self._layers,
            tune="lora",
            lora_rank=LORA_RANK,
            learning_rate=rate,
            total_steps=steps.total_steps(self._spec, size),
            total_tokens=steps.total_tokens(self._spec, size),
            seed=0,
        )
        train = self._spec.train
        assignment = TrainRung(
            context=WorkContext(
                settings=TrainSettings(
                    warmup=train.warmup,
                    schedule=train.schedule,
                    weight_decay=train.weight_decay,
                    grad_clip=train.grad_clip,
                    tokens_per_step=tokens_per_step,
                ),
                data=DataPaths(train=str(self._folder / "sets/train.npz"), eval=str(self._folder / "sets/eval.npz")),
                metric="loss",
                trunk=self._trunk,
            ),
            trial=trial,
            selection=self._selection,
            execution=self._execution,
            folder=str(self._folder / "trials" / trial.trial_id),
            rung=0,
            stop_step=trial.total_steps,
        )
        started = time.monotonic()
        result = self._host.run_trial(assignment)
        print(
            f"# {trial.trial_id}: {trial.total_steps} steps, {result.eval_loss}, {time.monotonic() - started:.1f} s", flush=True
        )
        return result.eval_loss if result.eval_loss is not None else float("inf")

    def _size(self, tokens_per_step: int) -> Any:
        train = self._spec.train.model_copy(update={"tokens_per_step": tokens_per_step})
        return data_size(self._summary, self._spec.model_copy(update={"train": train}), self._folder / "sets")


if __name__ == "__main__":
    main()
