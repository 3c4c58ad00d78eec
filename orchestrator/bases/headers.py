"""A base's folder without weights: config.json and other small files, and of every weight file its header alone.

It lies in our own cache, one for each commit, so that a second plan reads nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.anatomy.weights import MAX_HEADER_BYTES, header_file
from orchestrator.bases.files import plan_files, weight_files
from orchestrator.hub import Commit, fetch_files, list_files, read_range
from orchestrator.hub.client import CACHE_REMEDY, own_folder
from orchestrator.store import output_to, write_atomic
from orchestrator.store.files import partial_path

FIRST_BYTES = 1 << 14
"""Bytes of a file's first request. A shard of a large model has a header of about 3 KB; a whole small model, of some 40 KB."""
CONNECTIONS = 8
COMPLETE = ".complete-with-code"
"""File whose presence says that all others are there."""


def headers_folder(commit: Commit) -> Path:
    """Return a folder from which the anatomy can be read, after fetching what of it is not cached yet.

    Raises:
        BaseError: the repository has no safetensors weights, or cannot be read.
    """
    folder = own_folder(commit) / "headers"
    # Links to files that were removed from the hub's cache are broken.
    if (folder / COMPLETE).is_file() and all(path.is_file() for path in folder.rglob("*") if not path.is_dir()):
        return folder
    sizes = list_files(commit)
    small = plan_files(sizes)
    snapshot = fetch_files(commit, small)
    weights = weight_files(commit, sizes, snapshot)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        headers = list(pool.map(lambda name: _read_header(commit, name, sizes[name]), weights))
    with output_to(folder, remedy=CACHE_REMEDY):
        _write(folder, snapshot, small, dict(zip(weights, headers, strict=True)))
    return folder


def _read_header(commit: Commit, name: str, size: int) -> bytes:
    """Return what `header_file` holds of a weight file of `size` bytes."""
    begin = read_range(commit, name, 0, min(FIRST_BYTES, size))
    length = struct.unpack("<Q", begin[:8])[0] if len(begin) >= 8 else 0
    # A file that is no safetensors announces nonsense here; the reader says so.
    end = min(8 + length, size) if length <= MAX_HEADER_BYTES else 8
    if end > len(begin):
        begin += read_range(commit, name, len(begin), end)
    return struct.pack("<Q", size) + begin[:end]


def _write(folder: Path, snapshot: Path, small: Sequence[str], headers: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in small:
        link = folder / name
        link.parent.mkdir(exist_ok=True)
        # Another plan may be writing the same links.
        partial = partial_path(link)
        partial.symlink_to(snapshot / name)
        partial.replace(link)
    for name, content in headers.items():
        write_atomic(header_file(folder / name), content)
    write_atomic(folder / COMPLETE, b"")
