"""Small bases, written tensor by tensor: config.json and safetensors files with zeros in them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.anatomy import ModelAnatomy
from orchestrator.anatomy.config import find_layout, read_config, read_values
from orchestrator.anatomy.reader import implied_anatomy

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
Stored = Mapping[str, tuple[int, ...]]

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": "bfloat16"}
SPARSE: dict[str, Any] = {**GROUPED, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
GEMMA: dict[str, Any] = {**GROUPED, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi": {**GROUPED, "tie_word_embeddings": False},
    "phi3": {**GROUPED, "pad_token_id": 0, "eos_token_id": 1},
    "mixtral": {**GROUPED, "num_local_experts": 6},
    "qwen2_moe": {**SPARSE, "shared_expert_intermediate_size": 12},
    "qwen3_moe": SPARSE,
    "gpt2": {
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    },
    "gpt_neox": SIZES,
    "opt": {
        **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    },
    "bert": {**SIZES, "max_position_embeddings": 32},
    "roberta": {**SIZES, "max_position_embeddings": 66},
    "distilbert": {
        "vocab_size": 40,
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "dtype": "float32",
    },
    "vit": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 36,
        "patch_size": 8,
        "num_channels": 2,
        "dtype": "float32",
    },
}
"""A small config of every known layout, with three blocks of width 16."""


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **CONFIGS[model_type], **changes}


LLAMA = config_of("llama")
BERT = config_of("bert")


def write_base(folder: Path, config: Mapping[str, Any], *files: tuple[str, Stored], dtype: str = "BF16") -> Path:
    """A folder with config.json and the given safetensors files; several files get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files:
        write_safetensors(folder / name, tensors, dtype=dtype)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in files for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_safetensors(path: Path, tensors: Stored, *, dtype: str = "BF16") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def row_of(folder: Path) -> ModelAnatomy:
    """What the table says of a config alone, also of a layout that is learned from its class instead."""
    values = read_values(folder)
    layout = find_layout(values)
    assert layout is not None
    return implied_anatomy(read_config(folder, values, layout))


def implied_tensors(config: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """What the reader expects of a config, to be written as weights; `test_truth` proves it against transformers."""
    return {name: tensor.shape for name, tensor in row_of(write_base(folder, config)).tensors.items()}
