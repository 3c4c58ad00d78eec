"""Kill a writer at every point where the disk's state changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KilledEverywhere = Callable[[Callable[[], None], Callable[[], None]], Iterator[str]]
KILLED = 17
MOST_POINTS = 200


@pytest.fixture
def killed_everywhere() -> KilledEverywhere:
    return _killed_everywhere


def _killed_everywhere(write: Callable[[], None], reset: Callable[[], None]) -> Iterator[str]:
    """Run `write` in a process of its own again and again, dying at the 1st, 2nd, ... change of the disk.

    Yields after each death (`before rename 1`, `after fsync 2`, ...), and ends when `write` comes through.
    """
    for point in range(MOST_POINTS):
        reset()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _die_at(point, writer)
            try:
                write()
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            where = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            assert point > 5, "the writer came through before anything was killed"
            return
        assert code == KILLED, f"the writer failed by itself, with {code}"
        yield where
    raise AssertionError("the writer never came through")


def _die_at(point: int, report: int) -> None:
    """Die before (even points) or after (odd points) the n-th call that changes the disk."""
    seen = 0

    def dying(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            number, seen = seen, seen + 1
            if number == point // 2 and point % 2 == 0:
                _exit(f"before {name} {number}")
            result = original(*args, **kwargs)
            if number == point // 2:
                _exit(f"after {name} {number}")
            return result

        setattr(owner, name, call)

    def _exit(where: str) -> None:
        os.write(report, where.encode())
        os._exit(KILLED)

    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (shutil, "rmtree"),
    ):
        dying(owner, name)
