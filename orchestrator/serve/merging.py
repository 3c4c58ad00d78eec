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
from orchestrator.anatomy.weights import seek_tensor
from orchestrator.errors import BaseError
from orchestrator.plan.merge_operations import (
    ApplyAdapter,
    Compose,
    Dequantize,
    Keep,
    LinkShard,
    MergePlan,
    NewTensor,
    Place,
    Replace,
    Single,
    WriteShard,
    WriteTensor,
)
from orchestrator.serve.dequantize import Held, hold, rows_of
from orchestrator.serve.shards import ShardWriter, link_or_copy, write_order
from orchestrator.spec.adapters import LORA_A, LORA_B
from orchestrator.store import sha256_file
from orchestrator.train.adapters.kinds import LIVE_KINDS, MergeRows
from orchestrator.train.model.stored import read_parameters
from orchestrator.units import MIB
from orchestrator.values import Value
from orchestrator.work.artifact import StoredAdapter

PIECE_BYTES = MIB
"""float32 bytes of one piece: pieces that fit in a core's own cache are merged several times as fast."""
COPY_BYTES = 8 * MIB
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types that safetensors maps to torch's and that a tensor here is computed in; others are copied byte by byte."""


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
    if tensor.dtype not in DTYPES:
        yield from _unchanged_bytes(plan, tensor)
        return
    dtype = DTYPES[tensor.dtype]
    match tensor.operation:
        case NewTensor(trained=info):
            yield from _stored_pieces(_mapped(Path(plan.artifact_folder), info), dtype)
        case Compose(sections=sections):
            stored = _source(plan, tensor)
            for section in sections:
                yield from _operated(plan, section.operation, stored[section.start : section.stop], dtype)
        case Keep() | Replace() | ApplyAdapter() | Dequantize():
            yield from _operated(plan, tensor.operation, _source(plan, tensor), dtype)


def _unchanged_bytes(plan: MergePlan, tensor: WriteTensor) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor that is only kept, uint8[...], whatever its type is.

    Raises:
        BaseError: the file or the tensor is gone, or it has changed since the plan was made.
    """
    assert tensor.source is not None
    assert isinstance(tensor.operation, Keep), f"{tensor.name}: {tensor.dtype} is only copied"
    path = Path(plan.base_folder) / tensor.source.file
    try:
        with path.open("rb") as file:
            left = seek_tensor(file, tensor.source.name)
            if left != tensor.num_bytes:
                raise ValueError(f"it now has {left} bytes")
            while left:
                piece = bytearray(file.read(min(left, COPY_BYTES)))
                # Of a truncated file nothing is left to read, and frombuffer raises ValueError.
                yield torch.frombuffer(piece, dtype=torch.uint8)
                left -= len(piece)
    except (OSError, ValueError, KeyError) as error:
        raise BaseError(f"{tensor.name} cannot be read: {error}", where=str(path), remedy="recompute the merge plan") from error


def _source(plan: MergePlan, tensor: WriteTensor) -> torch.Tensor:
    assert tensor.source is not None
    return _mapped(Path(plan.base_folder), tensor.source)


def _operated(plan: MergePlan, operation: Single, stored: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    match operation:
        case Keep():
            yield from _stored_pieces(stored, dtype)
        case Replace(trained=info, place=place):
            yield from _stored_pieces(_placed(_mapped(Path(plan.artifact_folder), info), place), dtype)
        case ApplyAdapter(adapter=adapter):
            yield from _adapted_pieces(plan, operation, stored, adapter, dtype)
        case Dequantize(adapter=adapter):
            yield from _adapted_pieces(plan, operation, stored, adapter, dtype)


def _placed(trained: torch.Tensor, place: Place) -> torch.Tensor:
    """Return the view of a trained parameter that a stored tensor holds."""
    view = trained[place.index] if place.index else trained
    view = view.narrow(place.axis, place.start, place.length) if place.length else view
    return view.transpose(-2, -1) if place.transposed else view


def _stored_pieces(stored: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    # Unchanged bytes need no arithmetic, so larger pieces save calls.
    if stored.dtype == dtype:
        yield from stored.reshape(-1).split(COPY_BYTES // stored.element_size())
    else:
        for piece in stored.reshape(-1).split(PIECE_BYTES // 4):
            yield piece.to(dtype)


def _adapted_pieces(
    plan: MergePlan,
    operation: ApplyAdapter | Dequantize,
    stored: torch.Tensor,
    adapter: StoredAdapter | None,
    dtype: torch.dtype,
) -> Iterator[torch.Tensor]:
    """Yield a stored tensor with its adapter, if it has one: a matrix, or the matrices of routed experts one by one."""
    place, trained = operation.place, dict[str, torch.Tensor]()
    by_expert = stored.dim() == 3
    if adapter is not None:
        trained = {suffix: _mapped(Path(plan.artifact_folder), info) for suffix, info in adapter.tensors.items()}
    first_expert = place.index[0] if place.index else 0 if place.axis else place.start
    # `start` counts rows of each expert, or experts where the stored tensor holds some of them.
    first_row = 0 if by_expert and not place.axis else place.start
    for number, matrix in enumerate(stored if by_expert else [stored]):
        merge_rows = None
        if adapter is not None:
            own = _of_expert(trained, first_expert + number, adapter.num_experts) if adapter.num_experts else trained
            merge_rows = LIVE_KINDS[adapter.kind].merger(own, adapter.scale, getattr(torch, plan.held_dtype))
        yield from _merged_matrix(plan, operation, matrix, merge_rows, dtype, first_row=first_row)


def _of_expert(trained: dict[str, torch.Tensor], expert: int, num_experts: int) -> dict[str, torch.Tensor]:
    """Return the adapter of one routed expert: rows of A[experts * r, in], every so many-th column of B[out, r * experts]."""
    a, b = trained[LORA_A], trained[LORA_B]
    return {LORA_A: a.unflatten(0, (num_experts, -1))[expert], LORA_B: b.unflatten(1, (-1, num_experts))[..., expert]}


def _merged_matrix(
    plan: MergePlan,
    operation: ApplyAdapter | Dequantize,
    matrix: torch.Tensor,
    merge_rows: MergeRows | None,
    dtype: torch.dtype,
    *,
    first_row: int,
) -> Iterator[torch.Tensor]:
    """Yield the rows of a stored matrix after merging it as weight [out, in].

    Args:
        first_row: Row of the weight that the matrix begins with.
    """
    turned = operation.place.transposed != operation.from_right
    weight: Held = matrix.T if turned else matrix
    num_rows, width = weight.shape
    if isinstance(operation, Dequantize):
        weight = _held(plan, operation, weight, first_row)
    # float32 rows that fit in a core's cache; at least one, however wide.
    step = max(1, PIECE_BYTES // (4 * width))
    # Stored the other way round, a row of the weight is a column of the file: the whole matrix is merged first.
    whole = torch.empty(num_rows, width, dtype=dtype) if turned else None
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        rows = rows_of(weight, start, stop)
        if merge_rows is not None:
            rows = merge_rows(rows.float(), slice(first_row + start, first_row + stop))
        if whole is None:
            yield rows.to(dtype)
        else:
            whole[start:stop] = rows
    if whole is not None:
        yield from _stored_pieces(whole.T.contiguous(), dtype)


def _held(plan: MergePlan, operation: Dequantize, weight: torch.Tensor, first_row: int) -> Held:
    """Return a weight with the values that training used: it was quantized with the rest of its parameter."""
    dtype = getattr(torch, plan.held_dtype)
    if operation.parameter is None:
        return hold(weight.contiguous(), dtype, operation.quantize)
    name = operation.parameter.name
    parameter = read_parameters(plan.base_folder, [operation.parameter])[name]
    held = hold((parameter.T if operation.from_right else parameter).contiguous(), dtype, operation.quantize)
    return rows_of(held, first_row, first_row + weight.shape[0])


def _mapped(folder: Path, info: TensorInfo) -> torch.Tensor:
    """Return a stored tensor, memory-mapped: its pages belong to the page cache, not to this process.

    Raises:
        BaseError: the file or the tensor is gone, or it has changed since the plan was made.
    """
    if info.encoding is not None:
        return read_parameters(folder, [info])[info.name]
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
