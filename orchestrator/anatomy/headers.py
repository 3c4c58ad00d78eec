"""Read the headers of safetensors files: names, shapes and types, without loading weights.

The format (huggingface/safetensors, README "Format"): eight bytes, the header's length N as a little-endian unsigned integer;
N bytes of JSON, name -> {dtype, shape, data_offsets: [begin, end]}; then the tensors, whose offsets count from the end of the
header and cover the rest of the file without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.values import TensorInfo
from orchestrator.errors import BaseError
from orchestrator.units import format_bytes

MAX_HEADER_BYTES = 100_000_000
"""Limit of the format itself."""
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
LFS_POINTER = b"version https://git-lfs"
AGAIN = "download or copy the file again and compare its checksum"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one file by stored name, after checking that the file is as long as its header says.

    Raises:
        BaseError: the file is missing, truncated, too long, not a safetensors file, or a Git LFS pointer.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            if (prefix + file.read(len(LFS_POINTER) - 8)).startswith(LFS_POINTER):
                raise BaseError(
                    "the file is a Git LFS pointer, not the weights",
                    where=str(path),
                    remedy="fetch the weights: `git lfs pull` in the base's repository",
                )
            if len(prefix) < 8:
                raise BaseError(f"truncated: {size} bytes", where=str(path), expected="at least a header", remedy=AGAIN)
            length = struct.unpack("<Q", prefix)[0]
            _check_length(path, length, size)
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError:
        raise BaseError("the file is missing", where=str(path), remedy=AGAIN) from None
    entries = _parse(path, text)
    data_bytes = 0
    for name, entry in entries.items():
        _check_entry(path, name, entry)
        data_bytes = max(data_bytes, entry["data_offsets"][1])
    _check_size(path, expected=8 + length + data_bytes, found=size)
    return {
        name: TensorInfo(name=name, shape=tuple(entry["shape"]), dtype=entry["dtype"], file=path.name)
        for name, entry in entries.items()
    }


def _check_length(path: Path, length: int, size: int) -> None:
    if length > MAX_HEADER_BYTES:
        raise BaseError(
            f"not a safetensors file: its first eight bytes announce a header of {length} bytes",
            where=str(path),
            remedy="convert the weights to safetensors",
        )
    if 8 + length > size:
        raise BaseError(
            f"truncated within its header: {size} bytes",
            where=str(path),
            expected=f"at least {8 + length} bytes",
            remedy=AGAIN,
        )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise BaseError(f"the header is not valid JSON: {error}", where=str(path), remedy=AGAIN) from None
    if not isinstance(header, dict):
        raise BaseError("the header is not a JSON object", where=str(path), remedy=AGAIN)
    entries = cast("dict[str, Any]", header)
    entries.pop("__metadata__", None)
    if not entries:
        raise BaseError("the file holds no tensor", where=str(path), remedy="check that this is the intended base")
    return entries


def _check_entry(path: Path, name: str, entry: Any) -> None:
    try:
        dtype, (begin, end) = str(entry["dtype"]), entry["data_offsets"]
        shape = [int(axis) for axis in entry["shape"]]
        whole = all(isinstance(number, int) and number >= 0 for number in (*entry["shape"], begin, end))
    except (KeyError, TypeError, ValueError):
        dtype, begin, end, shape, whole = "", 0, 0, [], False
    if not whole:
        raise BaseError(f"the header's entry for {name} is not valid: {entry}", where=str(path), remedy=AGAIN)
    expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
    if dtype in DTYPE_BYTES and end - begin != expected:
        raise BaseError(
            f"{name} has {end - begin} bytes in the header",
            where=str(path),
            expected=f"{expected} bytes for {dtype} {shape}",
            remedy=AGAIN,
        )


def _check_size(path: Path, *, expected: int, found: int) -> None:
    if found == expected:
        return
    word = "truncated" if found < expected else "longer than its header says"
    raise BaseError(
        f"{word}: {found} bytes ({format_bytes(found)})",
        where=str(path),
        expected=f"{expected} bytes ({format_bytes(expected)}) by its header",
        remedy=AGAIN,
    )
