"""Specs, files and tokenizers to prepare data with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from orchestrator.data import DataSummary, TokenizedSet, load_tokenizer, prepare_data
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import LoadedSpec, load_spec

settings.register_profile("busy machine", deadline=None, max_examples=60)
settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(SAMPLE_BASE)


@pytest.fixture
def base_with(tmp_path: Path) -> Callable[[str | None], Path]:
    """The sample's tokenizer with another chat template, or with none."""

    def make(template: str | None) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(SAMPLE_BASE / name, folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


class Preparation:
    """A spec's folder, in which files are written and prepared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.base = SAMPLE_BASE

    def jsonl(self, name: str, rows: list[Any]) -> Path:
        return self.write(name, "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def spec(self, task: str = "completion", *, seed: int = 0, replay: float = 0.0, **data: Any) -> LoadedSpec:
        values = {
            "name": "t",
            "base": {"model": "sample"},
            "task": task,
            "data": {"train": "train.jsonl", **data},
            "train": {"seed": seed, "replay": replay},
            "finetune": {},
        }
        self.write("spec.yaml", json.dumps(values))
        return load_spec(self.folder / "spec.yaml")

    def run(self, task: str = "completion", *, seed: int = 0, replay: float = 0.0, **data: Any) -> DataSummary:
        return prepare_data(self.spec(task, seed=seed, replay=replay, **data), self.base, self.out)

    def load(self, split: str) -> TokenizedSet:
        return TokenizedSet.load(self.out / f"{split}.npz")

    def dropped(self, summary: DataSummary) -> dict[tuple[str, str], tuple[int, tuple[str, ...]]]:
        return {(entry.split, entry.reason): (entry.count, entry.places) for entry in summary.dropped}


@pytest.fixture
def prepare(tmp_path: Path) -> Preparation:
    return Preparation(tmp_path)


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(start, start + count)]


@pytest.fixture
def rows_of_pairs() -> Callable[..., list[dict[str, str]]]:
    return pairs
