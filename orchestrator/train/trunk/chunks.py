"""Hidden states of one set at one cut, in pieces: on local disk, mapped into memory, or only in this process.

A piece holds whole documents. On disk it is a file of raw numbers and, as its last eight bytes, their CRC-32; it is
there whole or not at all. A piece that is missing, cut short or damaged reads as absent, and is made again.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from orchestrator.store import write_atomic

CHUNK_BYTES = 32 * 1024**2
"""A piece is about this large: small enough to be made again, and large enough that files are few."""
FOOTER = struct.Struct("<Q")


def chunk_borders(offsets: np.ndarray, token_bytes: int) -> np.ndarray:
    """Return int64[C + 1]: piece c holds documents borders[c] to borders[c + 1], at least one each.

    Args:
        offsets: int64[D + 1], document borders in tokens.
        token_bytes: Bytes of one position's hidden state.
    """
    piece_tokens = max(1, CHUNK_BYTES // token_bytes)
    borders, first = [0], 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + piece_tokens, side="right")) - 1
        first = max(first + 1, last)
        borders.append(first)
    return np.asarray(borders, dtype=np.int64)


class Chunks(Protocol):
    """The store for the pieces of one set at one cut."""

    def get(self, number: int, num_tokens: int) -> torch.Tensor | None:
        """Return [num_tokens, H], read-only; None if the piece is missing or damaged."""
        ...

    def put(self, number: int, states: torch.Tensor) -> None:
        """Keep [N, H], on the CPU."""
        ...


class DiskChunks:
    """Pieces as files, shared by every process of a machine; the operating system keeps in memory what there is room for."""

    def __init__(self, folder: Path, hidden_size: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self._hidden_size = hidden_size
        self._dtype = dtype

    def file(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.bin"

    def get(self, number: int, num_tokens: int) -> torch.Tensor | None:
        file, num_elements = self.file(number), num_tokens * self._hidden_size
        num_bytes = num_elements * self._dtype.itemsize
        try:
            if file.stat().st_size != num_bytes + FOOTER.size:
                return None
            # Mapped, so that the processes of a machine share its page cache; private, so that none can write to the file.
            mapped = torch.from_file(str(file), shared=False, size=num_bytes + FOOTER.size, dtype=torch.uint8)
        except (OSError, RuntimeError):
            return None
        numbers = mapped[:num_bytes]
        # A cache outlives runs and crashes: a damaged piece must cost a forward pass, not a wrong trial.
        if zlib.crc32(numbers.numpy().data) != FOOTER.unpack(mapped[num_bytes:].numpy().tobytes())[0]:
            return None
        return numbers.view(self._dtype).view(num_tokens, self._hidden_size)

    def put(self, number: int, states: torch.Tensor) -> None:
        data = states.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        write_atomic(self.file(number), data + FOOTER.pack(zlib.crc32(data)))


class MemoryChunks:
    """Pieces in this process, where no disk has room."""

    def __init__(self) -> None:
        self._pieces: dict[int, torch.Tensor] = {}

    def get(self, number: int, num_tokens: int) -> torch.Tensor | None:
        return self._pieces.get(number)

    def put(self, number: int, states: torch.Tensor) -> None:
        self._pieces[number] = states.contiguous()
