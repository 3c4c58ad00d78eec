"""Write or link weight files: written sequentially, hashed and synced along the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import struct
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from orchestrator.anatomy.values import DTYPE_BITS
from orchestrator.plan.merge_operations import WriteTensor
from orchestrator.store.files import usual_mode
from orchestrator.units import MIB

SYNC_BYTES = 256 * MIB
"""Bytes written between syncs, so that few dirty pages accumulate."""
CHUNKS_IN_FLIGHT = 2


def write_order(tensors: Sequence[WriteTensor]) -> list[WriteTensor]:
    """Return the tensors with wide types first, so that each starts at a multiple of its item size, as in the format's own
    writer."""
    return sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])


class ShardWriter:
    """Writes tensors in `write_order` into one safetensors file.

    A second thread hashes and writes while the caller computes the next piece; at most CHUNKS_IN_FLIGHT pieces wait.
    """

    def __init__(self, path: Path, tensors: Sequence[WriteTensor]) -> None:
        self.path = path
        self._left = sum(tensor.num_bytes for tensor in tensors)
        self._hash = hashlib.sha256()
        self._dirty_bytes = 0
        self._size = 0
        # Exclusive: an existing file may be a hard link to the base's own shard, which must not be overwritten.
        self._file = path.open("xb", buffering=0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self._pending: deque[Future[None]] = deque()
        self._put(memoryview(_header(tensors)))

    def write(self, piece: torch.Tensor) -> None:
        """Append a piece's bytes; it must not change afterwards."""
        flat = piece.detach().contiguous().reshape(-1).view(torch.uint8)
        self._left -= flat.numel()
        # hashlib and write release the GIL, so both overlap with computing the next piece.
        self._pending.append(self._thread.submit(self._put, memoryview(flat.numpy().data)))
        while len(self._pending) > CHUNKS_IN_FLIGHT:
            self._pending.popleft().result()

    def finish(self) -> tuple[str, int]:
        """Return SHA-256 and size of the file, after it was synced to disk."""
        while self._pending:
            self._pending.popleft().result()
        assert self._left == 0, f"{self.path.name}: {self._left} bytes of its tensors were not written"
        os.fsync(self._file.fileno())
        return self._hash.hexdigest(), self._size

    def _put(self, data: memoryview) -> None:
        self._hash.update(data)
        self._size += len(data)
        self._dirty_bytes += len(data)
        while data:
            # An unbuffered write may write less than it was given.
            data = data[self._file.write(data) :]
        if self._dirty_bytes >= SYNC_BYTES:
            os.fdatasync(self._file.fileno())
            self._dirty_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._file.close()


def _header(tensors: Sequence[WriteTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padded to 8 bytes, so that the tensors are aligned.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def link_or_copy(source: Path, target: Path) -> bool:
    """Make a hard link; copy if the file system allows none, or if the source has another mode than a new file.

    Returns:
        True if it is a link.

    """
    source = source.resolve()
    # A hard link shares its mode: a link to a private file could not be read by the server.
    if stat.S_IMODE(source.stat().st_mode) == usual_mode(target.parent):
        try:
            os.link(source, target)
            return True
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.ENOTSUP):
                raise
    shutil.copyfile(source, target)
    return False
