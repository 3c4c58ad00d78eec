"""Small bases of many classes, saved as transformers saves them, with weights that make a wrong computation visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.anatomy import ModelAnatomy
from orchestrator.anatomy.learning import Question
from orchestrator.anatomy.weights import read_weights
from orchestrator.probe.learn import learn
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.train.model.self_test import sharpen
from orchestrator.work.execution import BaseLoad

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gemma2": {**SIZES, "final_logit_softcapping": 5.0, "sliding_window": 6},
    "cohere": {**SIZES, "logit_scale": 0.25},
    "granite": {**SIZES, "logits_scaling": 4.0},
    "gpt2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
}


def small_folder(folder: Path, model_type: str, **changes: Any) -> Path:
    """Save a small model of this type, in float32."""
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float()
    sharpen(model)
    model.save_pretrained(folder)
    return folder


def small_anatomy(folder: Path) -> ModelAnatomy:
    """Return what the class shows; as `read_anatomy` for a type that is not in the table, without a process of its own."""
    stored = read_weights(folder)
    assert stored is not None
    question = Question(folder=str(folder), head="language_model", stored=tuple(stored.values()))
    return learn(question).model_copy(update={"folder": str(folder)})


def small_base(folder: Path, anatomy: ModelAnatomy, *, quantize: Any = "none", dtype: torch.dtype = torch.float32) -> LoadedBase:
    load = BaseLoad(folder=str(folder), model_type=anatomy.model_type, quantize=quantize, task="text")
    return load_base(load, anatomy, dtype=dtype, device=torch.device("cpu"))
