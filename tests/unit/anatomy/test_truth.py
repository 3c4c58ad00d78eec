"""Names, shapes and defaults against transformers itself: models built on the meta device, and one saved to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from orchestrator.anatomy import known_layouts, read_anatomy

from .bases import LLAMA, config_of, write_base

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ("llama", {"num_key_value_heads": None}),
    ("mistral", {}),
    ("mistral", {"head_dim": 32}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 8, "attention_bias": True}),
    ("bert", {}),
]


def parameters_of(config: dict[str, Any], *, classify: bool) -> dict[str, tuple[int, ...]]:
    values = {key: value for key, value in config.items() if key != "model_type"}
    kind = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(config["model_type"], **values, num_labels=5))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_every_layout_is_among_the_cases() -> None:
    assert {model_type for model_type, _ in CASES} == set(known_layouts())


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_names_and_shapes_are_those_of_the_model(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    config = config_of(model_type, **changes)
    anatomy = read_anatomy(write_base(tmp_path, config), need_weights=False)
    truth = parameters_of(config, classify=anatomy.kind == "encoder")
    classifier = {anatomy.classifier_weight, anatomy.classifier_bias}
    assert {name: tensor.shape for name, tensor in anatomy.tensors.items()} == {
        name: shape for name, shape in truth.items() if name not in classifier
    }
    assert sum(map(len, anatomy.blocks)) + len(anatomy.embeddings) + len(anatomy.final_norm) == len(
        [name for name in anatomy.tensors if name != anatomy.head_weight and "pooler" not in name]
    )


@pytest.mark.parametrize("model_type", known_layouts())
def test_the_classifier_has_the_names_of_the_model(tmp_path: Path, model_type: str) -> None:
    config = config_of(model_type)
    anatomy = read_anatomy(write_base(tmp_path, config), need_weights=False)
    truth = parameters_of(config, classify=True)
    assert truth[anatomy.classifier_weight] == (5, anatomy.hidden_size)
    new = set(truth) - set(anatomy.tensors)
    assert new == {anatomy.classifier_weight, anatomy.classifier_bias} - {""}


@pytest.mark.parametrize("model_type", known_layouts())
def test_defaults_are_those_of_the_config_class(tmp_path: Path, model_type: str) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 128, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 32}
    config = AutoConfig.for_model(model_type, **sizes)
    anatomy = read_anatomy(write_base(tmp_path, {"model_type": model_type, **sizes}), need_weights=False)
    assert anatomy.num_kv_heads == (getattr(config, "num_key_value_heads", None) or 32)
    assert anatomy.head_dim == (getattr(config, "head_dim", None) or 4)
    assert anatomy.max_positions == config.max_position_embeddings
    assert anatomy.tied == config.tie_word_embeddings
    assert {tensor.dtype for tensor in anatomy.tensors.values()} == {"F32"}


@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
def test_a_saved_model_is_read_as_it_is(tmp_path: Path, shard_size: str) -> None:
    config = AutoConfig.for_model(**{**LLAMA, "tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert ((tmp_path / "model.safetensors.index.json").is_file()) == (shard_size == "4KB")
    anatomy = read_anatomy(tmp_path, need_weights=True)
    assert anatomy.has_weights
    assert {name: tensor.shape for name, tensor in anatomy.tensors.items()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert {tensor.dtype for tensor in anatomy.tensors.values()} == {"BF16"}
    assert all((tmp_path / tensor.file).is_file() for tensor in anatomy.tensors.values())
    assert anatomy.num_parameters() == model.num_parameters()


def test_the_published_llama_shapes_count_right(repository: Path) -> None:
    counts = {
        size: read_anatomy(repository / "jobs" / "specs" / "shapes" / f"llama-3.1-{size}", need_weights=False).num_parameters()
        for size in ("8b", "70b")
    }
    assert counts == {"8b": 8_030_261_248, "70b": 70_553_706_496}


def test_a_real_base_is_read(real_data: Path) -> None:
    folder = real_data / "models" / "english-7m"
    anatomy = read_anatomy(folder, need_weights=True)
    assert anatomy.num_blocks == json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert anatomy.tied
    assert anatomy.num_parameters() == 6_951_168
