"""What this process is doing and whether it gets on: read by whoever looks after it from outside.

A process trains one thing at a time, so there is one heartbeat a process. Whatever is progress beats it: a phase that begins,
a micro-batch, a step. It does not look at itself: a process that is stopped could not.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

STEADY = ("training", "evaluating", "generating")
"""Phases made of many like parts, each with a beat: how long one takes is soon known. All others may do a long thing at once, or
wait for another gang."""
ENOUGH = 3
"""Beats of a phase after which its own times say how long the next one may take."""


class Heartbeat(NamedTuple):
    """A look at a process. Plain values: it is sent often."""

    phase: str
    step: int
    """The last training step of the current trial; 0 before the first."""
    beats: int
    """Grows with every progress."""
    longest_s: float
    """Longest time between two beats of this phase, in this process."""
    is_steady: bool
    """Whether `longest_s` says how long the next beat may take."""


NO_HEARTBEAT_YET = Heartbeat("starting", 0, 0, 0.0, is_steady=False)
"""Of a process that has said nothing yet."""


class _Recorder:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase, self._step, self._beats = "starting", 0, 0
        self._last = time.monotonic()
        self._seen: dict[str, tuple[int, float]] = {}
        """By phase: how many beats, and the longest time before one, seconds."""

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
    """Something else begins; `training` begins by itself, with the first step's end."""
    _RECORDER.enter(phase)


def beat(step: int | None = None) -> None:
    """It gets on.

    Args:
        step: The training step that has ended.
    """
    _RECORDER.beat(step)


def look() -> Heartbeat:
    """From any thread."""
    return _RECORDER.look()


def beat_before(*_: Any) -> None:
    """As a module's forward pre-hook."""
    _RECORDER.beat()
