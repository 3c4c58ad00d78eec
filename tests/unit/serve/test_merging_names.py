"""A merge writes what the base stores, under its names, whichever way the class holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

from orchestrator.anatomy import ModelAnatomy
from orchestrator.anatomy.values import TensorInfo
from orchestrator.anatomy.weights import read_weights
from orchestrator.plan.merge import make_merge_plan
from orchestrator.plan.merge_operations import LinkShard
from orchestrator.probe.names import map_names
from orchestrator.serve.merging import merge

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (AutoModelForCausalLM, SMALL),
    "gpt_oss": (AutoModelForCausalLM, SMALL),
    "nomic_bert": (AutoModelForMaskedLM, SMALL),
    "gpt2": (AutoModelForCausalLM, {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen3_vl_moe": (
        AutoModelForImageTextToText,
        {"text_config": SMALL, "vision_config": {**VISION, "deepstack_visual_indexes": [0]}},
    ),
}


class Base:
    """A saved model, its anatomy as far as a merge reads it, and the class that loads it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.auto, values = MODELS[kind]
        self.folder = folder
        config = AutoConfig.for_model(kind, **values, dtype="float32")
        torch.manual_seed(0)
        model = self.auto.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder, max_shard_size="12KB")
        with torch.device("meta"):
            empty = self.auto.from_config(config)
        stored = read_weights(folder)
        assert stored is not None
        self.names = map_names(empty, stored)

    def anatomy(self, sample: ModelAnatomy, **changes: Any) -> ModelAnatomy:
        """The sample's anatomy with these tensors."""
        given = {"folder": str(self.folder), "tensors": self.names.tensors, "extra": self.names.extra, "linears": ((),)}
        return sample.model_copy(update={**given, "tied": False, "head_weight": "lm_head.weight", **changes})

    def state(self, folder: Path) -> dict[str, torch.Tensor]:
        (folder / "config.json").write_bytes((self.folder / "config.json").read_bytes())
        model, info = self.auto.from_pretrained(folder, output_loading_info=True, dtype="float32")
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        return model.state_dict()


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture
def sample(make_base: Callable[..., ModelAnatomy]) -> ModelAnatomy:
    return make_base("sample")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mixtral", ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"]),
        ("gpt_oss", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.sinks"]),
        ("nomic_bert", ["nomic_bert.layers.1.self_attn.k_proj.weight", "nomic_bert.layers.0.post_attention_layernorm.weight"]),
        ("qwen3_vl_moe", ["model.language_model.layers.1.mlp.experts.down_proj"]),
    ],
)
def test_a_delta_is_written_in_the_stored_parts(
    kind: str, names: list[str], sample: ModelAnatomy, load_of: Callable, tools: Any, tmp_path: Path
) -> None:
    base = Base(kind, tmp_path / kind)
    before = base.state(tmp_path / kind)
    delta = {name: torch.randn_like(before[name]) for name in names}
    anatomy = base.anatomy(sample)
    after = base.state(merged(anatomy, tools.write_delta(tmp_path / "rung", delta), load_of, tmp_path / "out"))
    for name, weight in before.items():
        assert torch.equal(after[name], delta.get(name, weight)), name
    assert_stored_alike(base, tmp_path / "out")


def merged(anatomy: ModelAnatomy, artifact: Path, load_of: Callable, out: Path) -> Path:
    plan = make_merge_plan(anatomy, artifact, load_of(anatomy))
    out.mkdir()
    merge(plan, out)
    assert any(isinstance(shard, LinkShard) for shard in plan.shards)
    return out


def assert_stored_alike(base: Base, out: Path) -> None:
    """Names, shapes and types are those of the base."""
    found, wanted = stored_in(out), stored_in(base.folder)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()
    }
