"""Layouts that can be planned with and not trained, and bases of no known layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ViTForImageClassification

from orchestrator.anatomy import ModelAnatomy, known_layouts, read_anatomy, trainable_layouts
from orchestrator.errors import BaseError

from .bases import LLAMA, config_of, implied_tensors, write_base

PLAN_ONLY = sorted({*known_layouts()} - {*trainable_layouts()})
STRANGER: dict[str, Any] = {
    "model_type": "stranger",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "activation": "gelu",
    "architectures": ["StrangerForCausalLM"],
    "dtype": "bfloat16",
}


def error_of(folder: Path, *, need_weights: bool) -> BaseError:
    with pytest.raises(BaseError) as caught:
        read_anatomy(folder, need_weights=need_weights)
    assert caught.value.remedy
    assert str(folder) in caught.value.where
    return caught.value


def save(folder: Path, model_type: str, **changes: Any) -> Path:
    """A model as transformers writes it."""
    config: Any = AutoConfig.for_model(**config_of(model_type, **changes))
    model: Any = ViTForImageClassification(config) if model_type == "vit" else AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_the_reference_lists_every_layout(repository: Path) -> None:
    bases = (repository / "docs" / "spec.md").read_text().split("\n## Bases\n")[1]
    trained, planned = bases.rpartition("|\n")[0].split("| planned only |")
    assert {name for name in known_layouts() if f"`{name}`" in trained} == set(trainable_layouts())
    assert {name for name in known_layouts() if f"`{name}`" in planned} == set(PLAN_ONLY)


@pytest.mark.parametrize("model_type", PLAN_ONLY)
def test_a_plan_only_layout_says_why_it_cannot_be_trained(tmp_path: Path, model_type: str) -> None:
    folder = save(tmp_path, model_type)
    error = error_of(folder, need_weights=True)
    assert "can be planned for, not trained" in error.what
    assert read_anatomy(folder, need_weights=False).plan_only in error.what
    assert "llama" in error.expected
    assert model_type not in error.expected.replace(",", "").split()


@pytest.mark.parametrize("model_type", PLAN_ONLY)
def test_its_weights_may_have_other_names_and_must_be_as_many(tmp_path: Path, model_type: str) -> None:
    folder = save(tmp_path, model_type)
    anatomy = read_anatomy(folder, need_weights=False)
    assert not anatomy.has_weights
    assert {tensor.file for tensor in anatomy.tensors.values()} == {""}
    assert {tensor.dtype for tensor in anatomy.tensors.values()} == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    blocks = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, blocks: 4}))
    error = error_of(folder, need_weights=False)
    assert f"{anatomy.num_parameters():,} weights are stored" in error.what
    assert "by config.json" in error.expected


def test_experts_are_stored_one_by_one_and_planned_as_stacks(tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    assert b"block_sparse_moe.experts.5.w1.weight" in (folder / "model.safetensors").read_bytes()
    anatomy = read_anatomy(folder, need_weights=False)
    assert anatomy.tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 48, 16)
    assert "stacks the routed experts" in anatomy.plan_only


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "sdpa"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_a_config_key_can_make_a_base_plan_only(tmp_path: Path, model_type: str, changes: dict[str, Any], reason: str) -> None:
    assert read_anatomy(write_base(tmp_path / "plain", config_of(model_type)), need_weights=False).plan_only == ""
    folder = write_base(tmp_path / "base", config_of(model_type, **changes))
    assert reason in read_anatomy(folder, need_weights=False).plan_only
    assert reason in error_of(folder, need_weights=True).what


@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("opt", {"word_embed_proj_dim": 8}, "embeddings of 8 in a model of hidden size 16"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": 2}, "mlp_only_layers is 2"),
        ("qwen3_moe", {"num_experts": "6"}, "num_experts is '6'"),
        ("llama", {"hidden_act": None}, "hidden_act is None"),
        ("vit", {"image_size": [224, 224]}, "image_size is [224, 224]"),
        ("bert", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ("llama", {"text_config": {"model_type": "llama"}}, "a multimodal model"),
    ],
)
def test_configs_that_make_another_layout(tmp_path: Path, model_type: str, changes: dict[str, Any], what: str) -> None:
    assert what in error_of(write_base(tmp_path, config_of(model_type, **changes)), need_weights=False).what


def stranger(**changes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """Two blocks of a layout that nobody knows; keys of `changes` are names with `__` for the dots, None takes one out."""
    block = {
        "ln_1.weight": (16,),
        "ln_1.bias": (16,),
        "attn.qkv.weight": (32, 16),
        "attn.out.weight": (16, 16),
        "mlp.up.weight": (48, 16),
        "mlp.down.weight": (16, 48),
    }
    tensors = {f"net.h.{number}.{name}": shape for number in range(2) for name, shape in block.items()}
    tensors |= {"net.tok_emb.weight": (40, 16), "net.ln_f.weight": (16,), "output.weight": (40, 16)}
    tensors |= {name.replace("__", "."): shape for name, shape in changes.items() if shape}
    gone = {name.replace("__", ".") for name, shape in changes.items() if not shape}
    return {name: shape for name, shape in tensors.items() if name not in gone}


def recognised(folder: Path, tensors: dict[str, tuple[int, ...]], **changes: Any) -> ModelAnatomy:
    config = {key: value for key, value in {**STRANGER, **changes}.items() if value is not None}
    return read_anatomy(write_base(folder, config, ("model.safetensors", tensors)), need_weights=False)


def test_an_unknown_layout_is_recognised_from_its_names(tmp_path: Path) -> None:
    anatomy = recognised(tmp_path, stranger())
    assert (anatomy.model_type, anatomy.kind, anatomy.has_weights) == ("stranger", "decoder", False)
    assert "not in the table" in anatomy.plan_only
    assert (anatomy.num_blocks, anatomy.hidden_size, anatomy.vocab_size, anatomy.intermediate_size) == (2, 16, 40, 48)
    assert (anatomy.num_heads, anatomy.num_kv_heads, anatomy.head_dim, anatomy.max_positions) == (4, 2, 4, 64)
    assert (anatomy.blocks_module, anatomy.block_prefix, anatomy.backbone) == ("net.h", "net.h.{}.", "net")
    assert (anatomy.embeddings, anatomy.final_norm) == (("net.tok_emb.weight",), ("net.ln_f.weight",))
    assert (anatomy.head_weight, anatomy.tied) == ("output.weight", False)
    assert len(anatomy.blocks[1]) == 6
    assert anatomy.linears[1] == tuple(f"net.h.1.{name}.weight" for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down"))
    assert (anatomy.norm, anatomy.mlp, anatomy.activation, anatomy.stacked) == ("layer", "plain", "gelu", ((), ()))
    assert {tensor.dtype for tensor in anatomy.tensors.values()} == {"BF16"}


def test_a_recognised_layout_is_that_of_the_table_where_the_table_knows_it(tmp_path: Path) -> None:
    tensors = implied_tensors(LLAMA, tmp_path / "shape")
    known = read_anatomy(write_base(tmp_path / "a", LLAMA, ("model.safetensors", tensors)), need_weights=False)
    config = {**LLAMA, "model_type": "lamarck"}
    found = read_anatomy(write_base(tmp_path / "b", config, ("model.safetensors", tensors)), need_weights=False)
    same = known.model_dump(exclude={"model_type", "folder", "has_weights", "plan_only", "config_sha256"})
    assert found.model_dump(exclude={"model_type", "folder", "has_weights", "plan_only", "config_sha256"}) == same


def test_buffers_are_no_parameters(tmp_path: Path) -> None:
    buffers = {f"net.h.{number}.attn.bias": (1, 1, 64, 64) for number in range(2)} | {"net.h.0.rotary.inv_freq": (2,)}
    assert set(recognised(tmp_path / "a", {**stranger(), **buffers}).tensors) == set(stranger())
    gpt2 = implied_tensors(config_of("gpt2"), tmp_path / "shape")
    old = {name.removeprefix("transformer."): shape for name, shape in gpt2.items()}
    old |= {f"h.{number}.attn.bias": (1, 1, 64, 64) for number in range(3)}
    folder = write_base(tmp_path / "b", config_of("gpt2"), ("model.safetensors", old), dtype="F32")
    assert set(read_anatomy(folder, need_weights=False).tensors) == set(gpt2)


def test_quantized_matrices_do_not_tell_their_shapes(tmp_path: Path) -> None:
    folder = write_base(tmp_path, STRANGER, ("model.safetensors", stranger()), dtype="U8")
    assert "is stored as U8" in error_of(folder, need_weights=False).what


def test_a_recognised_layout_is_not_trained(tmp_path: Path) -> None:
    recognised(tmp_path, stranger())
    assert "unknown layout: model_type 'stranger'" in error_of(tmp_path, need_weights=True).what


@pytest.mark.parametrize(
    ("tensors", "changes", "what"),
    [
        ({"a.weight": (3, 4)}, {}, "found 0 repeated blocks"),
        (stranger(vision__layers__0__w=(4, 4)), {}, "found 2 repeated blocks"),
        (stranger(net__h__1__attn__out__weight=(16, 8)), {}, "net.h.1. does not have the names and shapes of net.h.0."),
        (stranger(net__h__1__extra__weight=(16,)), {}, "net.h.1. does not have the names and shapes"),
        (stranger(net__h__3__ln_1__weight=(16,)), {}, "not numbered from 0 to 3"),
        (stranger(net__tok_emb__weight=None), {}, "an embedding [vocabulary, hidden] is not among"),
        (stranger(), {"num_attention_heads": None}, "config.json has none of num_attention_heads"),
        (stranger(), {"max_position_embeddings": None}, "config.json has none of max_position_embeddings"),
        (
            stranger(net__h__0__moe__experts__w=(4, 8, 16), net__h__1__moe__experts__w=(4, 8, 16)),
            {},
            "belongs to a mixture of experts",
        ),
        (stranger(), {"hidden_size": 32}, "net.tok_emb.weight is 16 wide"),
        (stranger(), {"num_attention_heads": "4"}, "num_attention_heads is '4'"),
    ],
)
def test_what_cannot_be_recognised_says_what_was_looked_for(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(BaseError) as caught:
        recognised(tmp_path, tensors, **changes)
    assert what in caught.value.what
    if "unknown layout" in caught.value.what:
        assert "gpt_neox, llama" in caught.value.expected


def test_without_weights_or_a_model_type_there_is_nothing_to_recognise(tmp_path: Path) -> None:
    assert "unknown layout" in error_of(write_base(tmp_path / "a", STRANGER), need_weights=False).what
    config = {key: value for key, value in STRANGER.items() if key != "model_type"}
    folder = write_base(tmp_path / "b", config, ("model.safetensors", stranger()))
    assert "model_type is missing" in error_of(folder, need_weights=False).what
