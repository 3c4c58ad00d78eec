"""The heartbeat of this process: its phase and its progress, read by the supervisor or watchdog that polls it.

A process trains one thing at a time, so it has one heartbeat. Every kind of progress counts a beat: a new phase, a micro-batch,
a step. Judging it is left to other processes, since a stopped process cannot judge itself.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

STEADY = ("training", "evaluating", "generating")
"""Phases made of many similar parts, each with a beat, so that the time of one is soon known. All others may do one long thing,
or wait for another gang."""
ENOUGH = 3
"""Beats of a phase after which its own times limit the next one."""


class Heartbeat(NamedTuple):
    """The progress of a process at one moment. Plain values, since it is sent often."""

    phase: str
    step: int
    """The last training step of the current trial; 0 before the first."""
    beats: int
    """Number of beats so far."""
    longest_s: float
    """Longest time between two beats of this phase, in this process."""
    is_steady: bool
    """True if `longest_s` limits the time to the next beat."""


NO_HEARTBEAT_YET = Heartbeat("starting", 0, 0, 0.0, is_steady=False)
"""The heartbeat of a process that has not reported yet."""


class _Recorder:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase, self._step, self._beats = "starting", 0, 0
        self._last = time.monotonic()
        self._seen: dict[str, tuple[int, float]] = {}
        """Number of beats and the longest time before one in seconds, by phase."""

    def enter(self, phase: str) -> None:
        with self._lock:
            self._note()
            self._phase = phase
            if phase not in STEADY:
                self._step = 0 if phase in ("preparing", "idle") else self._step

    def beat(self, step: int | None = None) -> None:
        with self._lock:
            self._note()
            if step is not None:
                self._phase, self._step = "training", step

    def look(self) -> Heartbeat:
        with self._lock:
            count, longest = self._seen.get(self._phase, (0, 0.0))
            return Heartbeat(self._phase, self._step, self._beats, longest, self._phase in STEADY and count >= ENOUGH)

    def _note(self) -> None:
        now = time.monotonic()
        count, longest = self._seen.get(self._phase, (0, 0.0))
        self._seen[self._phase] = (count + 1, max(longest, now - self._last))
        self._last = now
        self._beats += 1


_RECORDER = _Recorder()


def enter(phase: str) -> None:
    """Record a new phase; `training` starts automatically, with the end of the first step."""
    _RECORDER.enter(phase)


def beat(step: int | None = None) -> None:
    """Record progress.

    Args:
        step: The training step that has ended.
    """
    _RECORDER.beat(step)


def look() -> Heartbeat:
    """Return the current heartbeat; callable from any thread."""
    return _RECORDER.look()


def beat_before(*_: Any) -> None:
    """Record progress, as a module's forward pre-hook."""
    _RECORDER.beat()
