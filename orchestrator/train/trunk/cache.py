"""The local folder of stored trunks: addressed by content, under a budget, evicting the least recently used first.

    <folder>/<key>/chunk-00000.bin ...     one set at one cut; the key is a hash of all that decides its numbers
    <folder>/<key>/reserved                bytes that it may grow to
    <folder>/<key>/in-use                  locked by every process that has it open

Processes agree by file locks, which end with them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

RESERVED, IN_USE, LOCK = "reserved", "in-use", "lock"


class TrunkCache:
    """A budget of local disk for stored trunks.

    Args:
        folder: A folder on a local disk; created if it does not exist.
        max_bytes: Size limit of all entries; None for half of the disk space that is free without them.
    """

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._held: dict[str, int] = {}

    def open(self, key: str, num_bytes: int) -> Path | None:
        """Return the entry's folder, held until `close`; None if the budget has no room for it, even after evictions.

        Raises:
            OSError: the folder cannot be made or locked.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        entry = self._folder / key
        with _locked(self._folder / LOCK):
            if not (entry / RESERVED).exists():
                if not self._free_space(num_bytes):
                    return None
                entry.mkdir(exist_ok=True)
                (entry / IN_USE).touch()  # first: a folder without it is never evicted
                (entry / RESERVED).write_text(str(num_bytes))
            if key not in self._held:
                self._held[key] = os.open(entry / IN_USE, os.O_RDWR | os.O_CREAT)
                # The kernel releases the lock with the process, also when it is killed: no stale locks to clean up.
                fcntl.flock(self._held[key], fcntl.LOCK_SH)
            # The time of last use, by which entries are evicted.
            os.utime(entry / IN_USE)
        return entry

    def close(self) -> None:
        """Release every entry, so that it can be evicted."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def _free_space(self, num_bytes: int) -> bool:
        """Evict unused entries, the least recently used first, until so many bytes fit; return whether they fit."""
        entries = sorted(
            (path.parent for path in self._folder.glob(f"*/{IN_USE}")), key=lambda path: (path / IN_USE).stat().st_mtime
        )
        used = sum(_reserved(entry) for entry in entries)
        budget = self._max_bytes
        if budget is None:
            present = sum(_size(file) for entry in entries for file in entry.iterdir())
            budget = (shutil.disk_usage(self._folder).free + present) // 2
        for entry in entries:
            if used + num_bytes <= budget:
                break
            if _is_unused(entry):
                used -= _reserved(entry)
                shutil.rmtree(entry)
                logger.info("the stored trunk %s was deleted to free space", entry.name)
        return used + num_bytes <= budget


def _size(file: Path) -> int:
    """Return the file's size; 0 if it was renamed meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _reserved(entry: Path) -> int:
    try:
        return int((entry / RESERVED).read_text())
    except (OSError, ValueError):
        return 0


def _is_unused(entry: Path) -> bool:
    """Return whether no process has the entry open; the caller holds the folder's lock, so that none opens it meanwhile."""
    descriptor = os.open(entry / IN_USE, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def piece_lock(folder: Path, number: int, *, wait: bool) -> Iterator[bool]:
    """Lock a piece, which one process at a time may make. Without `wait`, yield False if another one holds the lock."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            # A lock on one byte of the file per piece: thousands of pieces need no file of their own.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
