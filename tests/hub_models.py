"""Bases of any size for `HubServer`: real configs and real safetensors headers, whose data is not kept anywhere."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from orchestrator.anatomy import read_anatomy
from orchestrator.anatomy.values import TensorInfo
from orchestrator.anatomy.weights import DTYPE_BITS, INDEX, SINGLE
from tests.hub_server import Content, Sparse

SHARD_BYTES = 5_000_000_000
"""As `save_pretrained` splits."""


def sparse_base(folder: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, Content]:
    """Return the files of a repository with the folder's config.json and the weights that it implies, in shards with an index."""
    shards: list[list[TensorInfo]] = [[]]
    for tensor in read_anatomy(folder, need_weights=False).tensors.values():
        if shards[-1] and sum(map(_num_bytes, shards[-1])) + _num_bytes(tensor) > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    files: dict[str, Content] = {"config.json": folder / "config.json"}
    if len(shards) == 1:
        return files | {SINGLE: _sparse_file(shards[0])}
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        files[name] = _sparse_file(tensors)
        weight_map |= {tensor.name: name for tensor in tensors}
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def _num_bytes(tensor: TensorInfo) -> int:
    return math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8


def _sparse_file(tensors: list[TensorInfo]) -> Sparse:
    header, offset = {}, 0
    for tensor in tensors:
        end = offset + _num_bytes(tensor)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return Sparse(struct.pack("<Q", len(text)) + text, 8 + len(text) + offset)
