"""Processes are named for good by pid and start time, seen when they are stopped, and ended even then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from orchestrator.runtime import hang_detection
from orchestrator.runtime.hang_detection import ProcessId, stat_of
from orchestrator.runtime.ray_health import descendants


@pytest.fixture
def process() -> Iterator[ProcessId]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield ProcessId(0, "here", "node", process.pid, stat_of(process.pid)[1])
        process.kill()


def within(seconds: float, process: ProcessId, state: str) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if hang_detection._states([process]) == [state]:
            return True
        time.sleep(0.02)
    return False


def test_a_stopped_process_is_seen_and_ended(process: ProcessId) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    assert within(5, process, "T")
    hang_detection._end([process])
    assert within(5, process, ""), "a zombie is gone too"


def test_another_process_of_the_same_pid_is_left_alone(process: ProcessId) -> None:
    other = process._replace(started_at=process.started_at + 1)
    assert hang_detection._states([other]) == [""]
    hang_detection._end([other])
    assert stat_of(process.pid)[0] in ("S", "R")


def test_descendants_are_those_that_this_process_has_started(process: ProcessId) -> None:
    found = descendants(os.getpid())
    assert (process.pid, process.started_at) in found
    assert os.getpid() not in {pid for pid, _ in found}
    assert os.getppid() not in {pid for pid, _ in found}
