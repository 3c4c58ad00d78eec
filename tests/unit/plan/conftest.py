"""Bases read from a config alone, specs and clusters in a line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.plan.values import ClusterDescription, DataSize, NodeDescription
from orchestrator.spec import JobSpec, LoadedSpec
from orchestrator.units import GIB

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "heads": 4, "kv": 2, "blocks": 4, "vocab": 512, "tied": True},
    "narrow": {"hidden_size": 96, "intermediate_size": 192, "heads": 4, "kv": 2, "blocks": 4, "vocab": 512, "tied": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv": 8, "blocks": 32, "vocab": 128256, "tied": False},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "heads": 64, "kv": 8, "blocks": 80, "vocab": 128256, "tied": False},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelAnatomy]:
    """Anatomy of a Llama by the name of its shape."""

    @cache
    def read(name: str) -> ModelAnatomy:
        shape = SHAPES[name]
        folder = tmp_path_factory.mktemp(name)
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": shape["hidden_size"],
            "intermediate_size": shape["intermediate_size"],
            "num_attention_heads": shape["heads"],
            "num_key_value_heads": shape["kv"],
            "num_hidden_layers": shape["blocks"],
            "vocab_size": shape["vocab"],
            "max_position_embeddings": 8192,
            "tie_word_embeddings": shape["tied"],
            "dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config))
        return read_anatomy(folder, need_weights=False)

    return read


@pytest.fixture(scope="session")
def job() -> Callable[..., LoadedSpec]:
    """A spec from the sections that a test cares about; `quantize` and `task` by themselves."""

    def load(*, quantize: str = "none", task: str = "completion", **sections: Any) -> LoadedSpec:
        values = {
            "name": "test",
            "base": {"model": "base", "quantize": quantize},
            "task": task,
            "data": {"train": "train.jsonl", **sections.pop("data", {})},
            "search": {},
            **sections,
        }
        return LoadedSpec(spec=JobSpec.model_validate(values), path=Path("/specs/test.yaml"), text="")

    return load


@pytest.fixture(scope="session")
def gpus() -> Callable[..., ClusterDescription]:
    """`nodes` equal nodes with GPUs; memory in GiB."""

    def describe(
        nodes: int = 1, each: int = 8, memory: float = 80, host: float = 1000, name: str = "H100-80GB"
    ) -> ClusterDescription:
        node = NodeDescription(
            count=nodes,
            num_cpus=96,
            num_gpus=each,
            gpu_memory_bytes=round(memory * GIB),
            gpu_name=name,
            memory_bytes=round(host * GIB),
        )
        return ClusterDescription(nodes=(node,), source="test")

    return describe


@pytest.fixture(scope="session")
def cores() -> Callable[..., ClusterDescription]:
    """One node without GPUs."""

    def describe(count: int = 2, memory: float = 16) -> ClusterDescription:
        return ClusterDescription(nodes=(NodeDescription(num_cpus=count, memory_bytes=round(memory * GIB)),), source="test")

    return describe


@pytest.fixture(scope="session")
def data() -> Callable[..., DataSize]:
    def size(**changes: Any) -> DataSize:
        values = {
            "train_documents": 1000,
            "train_tokens": 400_000,
            "steps_per_epoch": 45,
            "eval_tokens": 40_000,
            "retain_tokens": 16_384,
            "longest_document_tokens": 512,
        }
        return DataSize.model_validate({**values, **changes})

    return size
