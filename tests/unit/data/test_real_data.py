"""Real corpora: every row is a document or is counted as left out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from orchestrator.data import TokenizedSet

KEPT = "the row is kept"


def accounted(summary: Any, split: str) -> int:
    """Rows of a split that became documents or were left out."""
    left_out = sum(entry.count for entry in summary.dropped if entry.split == split and KEPT not in entry.reason)
    return summary.splits[split].documents + left_out


def test_gsm8k_and_its_retention_text(prepare: Any, real_data: Path) -> None:
    prepare.base = real_data / "models" / "english-7m"
    folder = real_data / "data"
    summary = prepare.run(
        train=str(folder / "gsm8k" / "train.jsonl"),
        eval=0.05,
        test=str(folder / "gsm8k" / "test.jsonl"),
        retain=str(folder / "general" / "*.jsonl"),
        columns={"prompt": "question", "completion": "answer"},
        max_tokens=256,
        long_rows="truncate_prompt",
    )
    lines = {name: (folder / "gsm8k" / f"{name}.jsonl").read_bytes().count(b"\n") for name in ("train", "test")}
    assert accounted(summary, "train") + accounted(summary, "eval") == lines["train"]
    assert accounted(summary, "test") == lines["test"]
    assert summary.splits["test"].documents <= 500
    assert 0 < summary.splits["retain"].tokens <= 16384
    train = prepare.load("train")
    assert train.lengths.max() <= 256
    assert (train.num_supervised > 0).all()
    answers_end = train.ids[train.offsets[1:] - 1]
    assert len(set(answers_end.tolist())) == 1, "every answer ends with the end token"
    assert all("####" in answer for answer in train.answers)


def test_banking77(prepare: Any, real_data: Path) -> None:
    prepare.base = real_data / "models" / "english-7m"
    folder = real_data / "data" / "banking77"
    summary = prepare.run(
        "classify", train=str(folder / "train.csv"), eval=0.1, test=str(folder / "test.csv"), columns={"label": "category"}
    )
    rows: dict[str, list[dict[str, str]]] = {}
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows[name] = list(csv.DictReader(file))
    assert accounted(summary, "train") + accounted(summary, "eval") == len(rows["train"])
    assert accounted(summary, "test") == len(rows["test"])
    assert summary.classes == tuple(sorted({row["category"] for row in rows["train"]}))
    assert len(summary.classes) == 77
    train: TokenizedSet = prepare.load("train")
    assert sum(summary.class_counts) == len(train)
    assert min(summary.class_counts) > 0
