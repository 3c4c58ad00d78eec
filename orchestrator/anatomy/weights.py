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
from typing import Any, BinaryIO, cast

from orchestrator.anatomy.values import DTYPE_BITS, TensorInfo
from orchestrator.errors import BaseError
from orchestrator.units import MIB, format_bytes

MAX_HEADER_BYTES = 100_000_000
"""Limit of the format itself."""
COMPARED_BYTES = 4 * MIB
LFS_POINTER = b"version https://git-lfs"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
AGAIN = "download or copy the file again and compare its checksum"


def header_file(path: Path) -> Path:
    """Return the place of a file's header alone, where the file itself was not fetched: enough to plan.

    It holds the size of the file in eight bytes, little-endian, and then the file's beginning up to the end of its header.
    """
    return path.with_name(f"{path.name}.header")


def is_known(path: Path) -> bool:
    """Return whether the file is there, or its header alone."""
    return path.is_file() or header_file(path).is_file()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one file by stored name, after checking that the file is as long as its header says.

    Where the file is missing and `header_file` is there, that is read instead.

    Raises:
        BaseError: the file is missing, truncated, too long, not a safetensors file, or a Git LFS pointer.
    """
    alone = not path.exists() and header_file(path).exists()
    try:
        with (header_file(path) if alone else path).open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0] if alone else path.stat().st_size
            begin = file.tell()
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
            file.seek(begin + 8)
            text = file.read(length)
    except FileNotFoundError:
        raise BaseError("the file is missing", where=str(path), remedy=AGAIN) from None
    entries = _parse(path, text)
    data_bytes = 0
    for name, entry in entries.items():
        _check_entry(path, name, entry)
        data_bytes = max(data_bytes, entry["data_offsets"][1])
    # The format allows no gaps, so the header determines the size of the file and a truncated download is found.
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
    if dtype not in DTYPE_BITS:
        raise BaseError(
            f"{name} is stored as {dtype}, which is no type of safetensors",
            where=str(path),
            expected=", ".join(DTYPE_BITS),
            remedy="leave the tensor out of the file, or use the base in 16 bit",
        )
    expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != expected:
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


def read_weights(folder: Path) -> dict[str, TensorInfo] | None:
    """Return the stored tensors by stored name, or None if the folder has no weights at all.

    Raises:
        BaseError: pickles, a broken or missing index, a missing or damaged file.
    """
    if is_known(folder / SINGLE):
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise BaseError(
            f"the only weights are pickles ({', '.join(pickles[:3])}), and pickle weights can run code when loaded",
            where=str(folder),
            expected=f"{SINGLE}, or shards with {INDEX}",
            remedy="convert to safetensors in a place where running that code is safe (`save_pretrained` writes safetensors)",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise BaseError(
            f"safetensors files without {INDEX}: {', '.join(others[:3])}",
            where=str(folder),
            expected=f"one {SINGLE}, or shards with {INDEX}",
            remedy=f"copy {INDEX} from the base too",
        )
    return None


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    try:
        weight_map = cast("dict[str, Any]", json.loads(index.read_bytes()))["weight_map"]
        places = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BaseError("not a valid index: `weight_map` is missing", where=str(index), remedy="copy the index again") from None
    files = sorted(set(places.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise BaseError(f"a shard outside the folder: {outside[0]}", where=str(index), remedy="copy the index again")
    missing = [file for file in files if not is_known(folder / file)]
    if missing:
        raise BaseError(
            f"{len(missing)} of {len(files)} shards missing: {', '.join(missing[:3])}",
            where=str(folder),
            remedy="copy the missing shards into the folder",
        )
    headers = {file: read_header(folder / file) for file in files}
    for name, file in places.items():
        if name not in headers[file]:
            raise BaseError(f"{name} is not in {file}, where the index puts it", where=str(index), remedy="copy the base again")
    return {name: headers[file][name] for name, file in places.items()}


def same_values(folder: Path, first: TensorInfo, second: TensorInfo) -> bool:
    """Return whether two stored tensors are equal, byte by byte; neither is held in memory.

    True if shapes and types are equal and there are only the headers of the files: the run itself compares again.
    """
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    if not ((folder / first.file).is_file() and (folder / second.file).is_file()):
        return True
    with (folder / first.file).open("rb") as one, (folder / second.file).open("rb") as other:
        left = seek_tensor(one, first.stored_name or first.name)
        seek_tensor(other, second.stored_name or second.name)
        while left:
            size = min(left, COMPARED_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def seek_tensor(file: BinaryIO, name: str) -> int:
    """Move to the first byte of a tensor in a file open at its beginning, and return its number of bytes."""
    length = struct.unpack("<Q", file.read(8))[0]
    begin, end = json.loads(file.read(length))[name]["data_offsets"]
    file.seek(8 + length + begin)
    return end - begin
