"""Small bases, written tensor by tensor: config.json and safetensors files with zeros in them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
Stored = Mapping[str, tuple[int, ...]]

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "dtype": "float32",
}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    base = BERT if model_type == "bert" else LLAMA
    return {**base, "model_type": model_type, **changes}


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


def implied_tensors(config: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """What the reader expects of a config, to be written as weights; `test_truth` proves it against transformers."""
    from orchestrator.anatomy import read_anatomy

    anatomy = read_anatomy(write_base(folder, config), need_weights=False)
    return {name: tensor.shape for name, tensor in anatomy.tensors.items()}
