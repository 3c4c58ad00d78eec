"""A small real plan: the sample base, four options, two cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.plan import make_plan
from orchestrator.plan.values import ClusterDescription, DataSize, NodeDescription, RunPlan
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import load_spec
from orchestrator.units import GIB


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
