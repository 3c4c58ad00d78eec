"""Parameters by their stored names: what `map_names` says equals what `from_pretrained` loads, element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from orchestrator.anatomy.weights import read_weights
from orchestrator.errors import BaseError
from orchestrator.probe.names import NameMap, map_names
from orchestrator.train.model.stored import part_of, read_parameters

CAUSAL, MASKED, CLASSES = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
EXPERTS: dict[str, Any] = {
    **SMALL,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    **EXPERTS,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (CAUSAL, SMALL),
    "phi3": (CAUSAL, SMALL),
    "gpt_neox": (CAUSAL, SMALL),
    "gpt2": (CAUSAL, {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": (CAUSAL, EXPERTS),
    "qwen2_moe": (CAUSAL, EXPERTS),
    "qwen3_moe": (CAUSAL, EXPERTS),
    "olmoe": (CAUSAL, EXPERTS),
    "deepseek_v3": (CAUSAL, LATENT),
    "glm4_moe": (CAUSAL, EXPERTS),
    "gpt_oss": (CAUSAL, EXPERTS),
    "granitemoe": (CAUSAL, EXPERTS),
    "dbrx": (
        CAUSAL,
        {
            "vocab_size": 40,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jamba": (CAUSAL, {**EXPERTS, "use_mamba_kernels": False}),
    "bert": (MASKED, SMALL),
    "t5": (AutoModelForSeq2SeqLM, {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}),
}


def config_of(kind: str) -> Any:
    auto, values = MODELS[kind]
    return auto, AutoConfig.for_model(kind, **values, dtype="float32")


def saved(kind: str, folder: Path, *, shard: str = "20KB") -> tuple[Any, Any]:
    """Write a small model in the names of the hub, and return its class and config."""
    auto, config = config_of(kind)
    torch.manual_seed(0)
    model = auto.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    return auto, config


def mapped(auto: Any, folder: Path) -> NameMap:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = auto.from_config(config)
    stored = read_weights(folder)
    assert stored is not None
    return map_names(model, stored)


def assert_as_loaded(auto: Any, folder: Path, names: NameMap) -> None:
    loaded, info = auto.from_pretrained(folder, output_loading_info=True, dtype="float32")
    state = loaded.state_dict()
    assert set(names.missing) == set(info["missing_keys"])
    read = read_parameters(folder, names.tensors.values())
    for name, value in read.items():
        assert torch.equal(value, state[name]), name
    for name, first in names.tied.items():
        assert torch.equal(read[first], state[name]), name
    assert set(state) == {*read, *names.tied, *names.missing, *names.mismatched}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_as_loaded(kind: str, tmp_path: Path) -> None:
    auto, _ = saved(kind, tmp_path)
    names = mapped(auto, tmp_path)
    assert_as_loaded(auto, tmp_path, names)
    assert names.missing == () and names.extra == () and names.mismatched == {}
