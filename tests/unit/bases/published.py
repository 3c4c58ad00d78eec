"""A tiny Llama as it would be published, in one file or in shards."""

from __future__ import annotations

from pathlib import Path

from tests.unit.anatomy.bases import LLAMA, implied_tensors, write_base


def published(folder: Path, num_shards: int) -> Path:
    tensors = list(implied_tensors(LLAMA, folder).items())
    if num_shards == 1:
        return write_base(folder, LLAMA, ("model.safetensors", dict(tensors)))
    shards = [(f"shard-{number}.safetensors", dict(tensors[number::num_shards])) for number in range(num_shards)]
    return write_base(folder, LLAMA, *shards)
