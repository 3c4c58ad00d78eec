"""Execute a MergePlan tensor by tensor: mapped from the base, a few rows at a time in float32.

Besides mapped files, memory holds a few pieces of PIECE_BYTES, one low-rank pair, and the scales of one quantized tensor. Sums
are computed in float32 and rounded once, to the base's type.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from orchestrator.anatomy.values import TensorInfo
from orchestrator.errors import BaseError
from orchestrator.plan.merge import (
    ApplyAdapter,
    Dequantize,
    Keep,
    LinkShard,
    MergePlan,
    NewTensor,
    Replace,
    WriteShard,
    WriteTensor,
)
from orchestrator.serve.dequantize import HeldWeight, hold_quantized
from orchestrator.serve.shards import ShardWriter, link_or_copy, write_order
from orchestrator.store import sha256_file
from orchestrator.train.adapters.kinds import LIVE_KINDS
from orchestrator.units import MIB
from orchestrator.values import Value
from orchestrator.work.artifact import StoredAdapter

PIECE_BYTES = MIB
"""float32 bytes of one piece: pieces that fit in a core's own cache are merged several times as fast."""
COPY_BYTES = 8 * MIB
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MergedFile(Value):
    file: str
    sha256: str
    num_bytes: int
    linked: bool = False
    """True if it is a hard link to the base's own shard."""


class MergeRecord(Value):
    """Files that the merge wrote; hashes are computed while writing."""

    files: tuple[MergedFile, ...]
    seconds: float

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def hashes(self) -> dict[str, str]:
        return {file.file: file.sha256 for file in self.files}


def merge(plan: MergePlan, folder: Path) -> MergeRecord:
    """Write the merged weights, and the index if there are several shards, into `folder`.

    Args:
        folder: Exists, holds none of the output files, and is not yet what anybody reads.

    Raises:
        BaseError: a file of the base is no longer what the plan saw.
        OSError: the disk is full, or a file of that name exists.
    """
    started = time.monotonic()
    shards = plan.shards if plan.head is None else (*plan.shards, plan.head)
    files = [_link(plan, shard, folder) if isinstance(shard, LinkShard) else _write(plan, shard, folder) for shard in shards]
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(plan.weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return MergeRecord(files=tuple(files), seconds=time.monotonic() - started)


def _link(plan: MergePlan, shard: LinkShard, folder: Path) -> MergedFile:
    target = folder / shard.file
    linked = link_or_copy(Path(plan.base_folder) / shard.base_file, target)
    return MergedFile(file=shard.file, sha256=sha256_file(target), num_bytes=target.stat().st_size, linked=linked)


def _write(plan: MergePlan, shard: WriteShard, folder: Path) -> MergedFile:
    tensors = write_order(shard.tensors)
    with ShardWriter(folder / shard.file, tensors) as writer:
        for tensor in tensors:
            for piece in _pieces(plan, tensor):
                writer.write(piece)
        sha256, size = writer.finish()
    return MergedFile(file=shard.file, sha256=sha256, num_bytes=size)


def _pieces(plan: MergePlan, tensor: WriteTensor) -> Iterator[torch.Tensor]:
    """Yield the output tensor's rows in order, in its own type, one piece at a time."""
    base, trained = Path(plan.base_folder), Path(plan.artifact_folder)
    match tensor.operation:
        case Replace(trained=info) | NewTensor(trained=info):
            yield from _stored_pieces(trained, info, tensor)
        case Keep():
            assert tensor.source is not None
            yield from _stored_pieces(base, tensor.source, tensor)
        case ApplyAdapter(adapter=adapter):
            assert tensor.source is not None
            yield from _adapted_pieces(plan, _mapped(base, tensor.source), adapter, tensor)
        case Dequantize(adapter=adapter):
            assert tensor.source is not None
            held = hold_quantized(_mapped(base, tensor.source), getattr(torch, plan.held_dtype))
            yield from _adapted_pieces(plan, held, adapter, tensor)


def _stored_pieces(folder: Path, info: TensorInfo, tensor: WriteTensor) -> Iterator[torch.Tensor]:
    stored = _mapped(folder, info)
    # Unchanged bytes need no arithmetic, so larger pieces save calls.
    if stored.dtype == DTYPES[tensor.dtype]:
        yield from stored.reshape(-1).split(COPY_BYTES // stored.element_size())
    else:
        for piece in stored.reshape(-1).split(PIECE_BYTES // 4):
            yield piece.to(DTYPES[tensor.dtype])


def _adapted_pieces(
    plan: MergePlan, weight: torch.Tensor | HeldWeight, adapter: StoredAdapter | None, tensor: WriteTensor
) -> Iterator[torch.Tensor]:
    """Yield rows of the weight [out, in] with its adapter, if it has one."""
    num_rows, width = tensor.shape
    # float32 rows that fit in a core's cache; at least one, however wide.
    step = max(1, PIECE_BYTES // (4 * width))
    merge_rows = None
    if adapter is not None:
        trained = {suffix: _mapped(Path(plan.artifact_folder), info) for suffix, info in adapter.tensors.items()}
        merge_rows = LIVE_KINDS[adapter.kind].merger(trained, adapter.scale, getattr(torch, plan.held_dtype))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        rows = weight.rows(start, stop) if isinstance(weight, HeldWeight) else weight[start:stop]
        if merge_rows is not None:
            rows = merge_rows(rows.float(), slice(start, stop))
        yield rows.to(DTYPES[tensor.dtype])


def _mapped(folder: Path, info: TensorInfo) -> torch.Tensor:
    """Return a stored tensor, memory-mapped: its pages belong to the page cache, not to this process.

    Raises:
        BaseError: the file or the tensor is gone, or it has changed since the plan was made.
    """
    path = folder / info.file
    try:
        with safe_open(path, framework="pt", device="cpu") as reader:
            tensor = reader.get_tensor(info.stored_name or info.name)
    # safetensors raises its own error types besides OSError.
    except Exception as error:
        raise BaseError(f"{info.name} cannot be read: {error}", where=str(path), remedy="recompute the merge plan") from error
    if tuple(tensor.shape) != info.shape or tensor.dtype != DTYPES[info.dtype]:
        raise BaseError(
            f"{info.name} is now {tensor.dtype} {list(tensor.shape)}",
            where=str(path),
            expected=f"{info.dtype} {list(info.shape)}, as when the merge was planned",
            remedy="recompute the merge plan",
        )
    return tensor
