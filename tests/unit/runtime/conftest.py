"""A small real plan: the sample base, four options, two cores; and a small sweep that is submitted as often as wanted."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.plan import make_plan
from orchestrator.plan.values import ClusterDescription, DataSize, NodeDescription, RunPlan
from orchestrator.report.terminal import LogView
from orchestrator.runtime.prepare import Prepared, open_run, prepare
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import load_spec
from orchestrator.units import GIB
from tests.unit.runtime.exchange_bench import on_bench

__all__ = ["on_bench"]

TWO_CORES = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=8 * GIB),))


@pytest.fixture(scope="session")
def anatomy() -> ModelAnatomy:
    return read_anatomy(SAMPLE_BASE, need_weights=False)


@pytest.fixture(scope="session")
def plan(anatomy: ModelAnatomy, tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """Eight Optuna trials over {last:1, last:2} x {lora, full}, with rungs at 4, 12 and 36 steps."""
    spec = {
        "name": "plan",
        "base": {"model": "sample"},
        "task": "completion",
        "data": {"train": "train.jsonl", "max_tokens": 64},
        "train": {"epochs": 1, "tokens_per_step": 512},
        "search": {"layers": ["last:1", "last:2"], "tune": ["lora", "full"], "lora_rank": [4], "trials": 8},
        "resources": {"gangs": 1, "ranks_per_gang": 1},
    }
    path: Path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(json.dumps(spec))
    size = DataSize(
        train_documents=700,
        train_tokens=36 * 500,
        steps_per_epoch=36,
        eval_tokens=500,
        retain_tokens=500,
        longest_document_tokens=60,
    )
    cluster = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=16 * GIB),))
    return make_plan(load_spec(path), anatomy, size, cluster, job="sweep", spec_sha256="0" * 64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE_BASE, tmp_path / "base"))


@pytest.fixture
def shown() -> io.StringIO:
    """What the run's view has said."""
    return io.StringIO()


@pytest.fixture
def submit(tmp_path: Path, base: Path, shown: io.StringIO) -> Callable[..., Prepared]:
    """Prepares the same small sweep, every time it is called; `search` is laid over its section."""
    rows = [{"prompt": f"Count to {number}.", "completion": f"{number} it is"} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"name": "run", "base": {"model": "base"}, "task": "completion", "data": {"train": "train.jsonl", "max_tokens": 64}}
    view = LogView(shown)

    def prepared(
        cluster: ClusterDescription = TWO_CORES,
        search: dict[str, Any] | None = None,
        resources: dict[str, Any] | None = None,
        **values: Any,
    ) -> Prepared:
        searched = {"layers": ["last:1"], "trials": 2, "repeats": 1, **(search or {})}
        YAML().dump({**spec, "search": searched, "resources": resources or {}, **values}, tmp_path / "spec.yaml")
        loaded = load_spec(tmp_path / "spec.yaml")
        with open_run(loaded, "sweep", tmp_path / "runs", view) as run:
            return prepare(loaded, "sweep", run, view, lambda: cluster)

    return prepared
