"""Names, shapes and defaults against transformers itself: models built on the meta device, and some saved to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, ViTForImageClassification
from transformers.activations import ACT2FN

from orchestrator.anatomy import ModelAnatomy, known_layouts, read_anatomy

from .bases import CONFIGS, LLAMA, config_of, row_of, write_base

NUM_BLOCKS = 3
CASES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in CONFIGS),
    *((model_type, {"tie_word_embeddings": tied}) for model_type in ("llama", "gemma", "gpt2", "opt") for tied in (True, False)),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ("llama", {"num_key_value_heads": None}),
    ("mistral", {"head_dim": 32}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 8, "attention_bias": True}),
    ("gemma", {"attention_bias": True}),
    ("gemma3_text", {"attention_bias": True}),
    ("phi", {"qk_layernorm": True}),
    ("phi", {"tie_word_embeddings": True}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("gpt2", {"n_inner": 40}),
    ("opt", {"enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("vit", {"qkv_bias": False}),
    ("mixtral", {"num_key_value_heads": 4, "head_dim": 2}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "qkv_bias": False}),
    ("qwen2_moe", {"mlp_only_layers": [0, 2]}),
    ("qwen2_moe", {"decoder_sparse_step": 4}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1], "head_dim": 8}),
    ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True}),
]
FEW = {"vocab_size": 40, "hidden_size": 128, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 32}
LEAST = {
    "gpt2": {"vocab_size": 40, "n_embd": 128, "n_layer": 2, "n_head": 32},
    "distilbert": {"vocab_size": 40, "dim": 128, "n_layers": 2, "n_heads": 32},
    "vit": {"hidden_size": 128, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 32},
    "phi3": {**FEW, "pad_token_id": 0},
    "opt": {"vocab_size": 40, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 32, "word_embed_proj_dim": 128},
}
"""The keys without which there is no base; all others have a default."""


def model_of(config: dict[str, Any], *, classify: bool) -> nn.Module:
    values = {key: value for key, value in config.items() if key != "model_type"}
    kind: Any = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    with torch.device("meta"):
        built: Any = AutoConfig.for_model(config["model_type"], **values, num_labels=5)
        return ViTForImageClassification(built) if config["model_type"] == "vit" else kind.from_config(built)


def parameters_of(config: dict[str, Any], *, classify: bool) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model_of(config, classify=classify).named_parameters()}


def shapes_of(anatomy: ModelAnatomy) -> dict[str, tuple[int, ...]]:
    """With what the checkpoint lacks and `classify` makes anew."""
    new = {tensor.name: tensor.shape for tensor in anatomy.new_tensors}
    return {name: tensor.shape for name, tensor in anatomy.tensors.items()} | new


def test_every_layout_has_a_small_config() -> None:
    assert set(CONFIGS) == set(known_layouts())


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_names_and_shapes_are_those_of_the_model(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    config = config_of(model_type, **changes)
    anatomy = row_of(write_base(tmp_path, config))
    truth = parameters_of(config, classify=anatomy.kind == "encoder")
    classifier = {anatomy.classifier_weight, anatomy.classifier_bias}
    assert shapes_of(anatomy) == {name: shape for name, shape in truth.items() if name not in classifier}
    assert anatomy.num_blocks == NUM_BLOCKS
    for number, block in enumerate(anatomy.blocks):
        assert set(block) == {name for name in truth if name.startswith(anatomy.block_prefix.format(number))}
    parts = [*anatomy.embeddings, *anatomy.final_norm, *(name for block in anatomy.blocks for name in block)]
    assert len(parts) == len(set(parts))
    heads = {anatomy.head_weight, anatomy.head_bias}
    assert set(parts) == {name for name in anatomy.tensors if name not in heads and "pooler" not in name}


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_linears_stacks_and_the_rest_are_what_the_modules_are(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    config = config_of(model_type, **changes)
    anatomy = row_of(write_base(tmp_path, config))
    model = model_of(config, classify=anatomy.kind == "encoder")
    for block, linears, stacked in zip(anatomy.blocks, anatomy.linears, anatomy.stacked, strict=True):
        kinds = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in block}
        assert set(linears) == {name for name in block if kinds[name] in ("Linear", "Conv1D") and name.endswith("weight")}
        assert set(stacked) == {name for name in block if kinds[name].endswith("Experts")}
        norms = {kind for kind in kinds.values() if "norm" in kind.lower()}
        assert all((anatomy.norm == "layer") == (kind == "LayerNorm") for kind in norms)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert (anatomy.mlp == "gated") == bool(names & {"gate_proj", "gate_up_proj", "experts"})
    activation: Any = ACT2FN[anatomy.activation]
    used = [module for _, module in model.named_modules() if type(module) is type(activation)]
    assert len(used) >= NUM_BLOCKS


@pytest.mark.parametrize("model_type", known_layouts())
def test_the_classifier_has_the_names_of_the_model(tmp_path: Path, model_type: str) -> None:
    config = config_of(model_type)
    anatomy = row_of(write_base(tmp_path, config))
    truth = parameters_of(config, classify=True)
    assert truth[anatomy.classifier_weight] == (5, anatomy.hidden_size)
    new = set(truth) - set(anatomy.tensors) - {tensor.name for tensor in anatomy.new_tensors}
    assert new == {anatomy.classifier_weight, anatomy.classifier_bias} - {""}


@pytest.mark.parametrize("model_type", known_layouts())
def test_defaults_are_those_of_the_config_class(tmp_path: Path, model_type: str) -> None:
    sizes = LEAST.get(model_type, FEW)
    config: Any = AutoConfig.for_model(model_type, **sizes)
    anatomy = row_of(write_base(tmp_path, {"model_type": model_type, **sizes}))
    truth = parameters_of({"model_type": model_type, **sizes}, classify=anatomy.kind == "encoder")
    classifier = {anatomy.classifier_weight, anatomy.classifier_bias}
    assert shapes_of(anatomy) == {name: shape for name, shape in truth.items() if name not in classifier}
    assert anatomy.num_kv_heads == (getattr(config, "num_key_value_heads", None) or 32)
    assert anatomy.head_dim == (getattr(config, "head_dim", None) or 4)
    positions = {"vit": 197, "roberta": 510}.get(model_type) or config.max_position_embeddings
    assert anatomy.max_positions == positions
    assert anatomy.tied == getattr(config, "tie_word_embeddings", False)
    keys = ("hidden_act", "hidden_activation", "activation_function", "activation")
    assert anatomy.activation == next(getattr(config, key) for key in keys if hasattr(config, key))
    assert {tensor.dtype for tensor in anatomy.tensors.values()} == {"F32"}
    assert (anatomy.experts is not None) == hasattr(config, "num_experts_per_tok")
    if anatomy.experts is not None:
        found = (anatomy.experts.num_experts, anatomy.experts.experts_per_token)
        assert found == (config.num_experts, config.num_experts_per_tok)


@pytest.mark.parametrize(
    ("model_type", "expected"), [("mixtral", (6, 2, 24, 0)), ("qwen2_moe", (6, 2, 8, 12)), ("qwen3_moe", (6, 2, 8, 0))]
)
def test_experts_are_counted(tmp_path: Path, model_type: str, expected: tuple[int, ...]) -> None:
    experts = row_of(write_base(tmp_path, config_of(model_type))).experts
    assert experts is not None
    found = (experts.num_experts, experts.experts_per_token, experts.intermediate_size, experts.shared_intermediate_size)
    assert found == expected
    dense = config_of(model_type, decoder_sparse_step=4)
    if model_type != "mixtral":
        assert row_of(write_base(tmp_path / "dense", dense)).experts is None


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


def test_a_real_base_is_read(real_data: Path) -> None:
    folder = real_data / "models" / "english-7m"
    anatomy = read_anatomy(folder, need_weights=True)
    assert anatomy.num_blocks == json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert anatomy.tied
    assert anatomy.num_parameters() == 6_951_168
