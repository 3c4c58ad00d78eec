"""Detect processes that hang: those that are stopped, and those that have made no progress for too long.

The limit comes from the process's own history: a multiple of the longest time that a part of the same phase has taken. Without
a history (loading, compiling, a first step) it is minutes, since these can legitimately take that long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.errors import UsageError
from orchestrator.train.heartbeat import Heartbeat
from orchestrator.values import Value

POLL_S = 1.0
"""Seconds between two polls of the supervised processes."""


class HangTimeouts(Value):
    """Limits on the time that a process may go without progress, in seconds."""

    silent_s: float = 20.0
    """Time without any answer before its node is asked whether it is stopped."""
    steady_s: float = 60.0
    """Lower bound on the limit in a phase of many similar parts."""
    opening_s: float = 600.0
    """Limit while there is no history of how long a part takes."""
    factor: float = 10.0
    """Ratio of the limit to the longest part so far."""
    load_bytes_per_s: float = 20e6
    """Lowest plausible reading speed of a base, also over a slow network."""

    @staticmethod
    def from_environment() -> HangTimeouts:
        """Return the defaults scaled by ORCHESTRATOR_PATIENCE: 3 waits three times as long, for slow storage or a debugger.

        Raises:
            UsageError: it is not a positive number.
        """
        given = os.environ.get("ORCHESTRATOR_PATIENCE", "1")
        try:
            scale = float(given)
        except ValueError:
            scale = 0.0
        if not 0 < scale < float("inf"):
            raise UsageError("not a positive number", where=f"ORCHESTRATOR_PATIENCE={given}", remedy="set it to 1, or unset it")
        known = HangTimeouts()
        return HangTimeouts(silent_s=scale * known.silent_s, steady_s=scale * known.steady_s, opening_s=scale * known.opening_s)

    def for_base(self, num_bytes: int) -> HangTimeouts:
        """Return the limits for processes that load a base of `num_bytes`."""
        return self.model_copy(update={"opening_s": self.opening_s + num_bytes / self.load_bytes_per_s})


class ProcessId(NamedTuple):
    """The identity of a process and its node. Plain values, since it is sent between processes."""

    rank: int
    host: str
    node_id: str
    pid: int
    started_at: int
    """Start time in the kernel's clock ticks: with the pid it identifies one process, even if the pid is reused."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass
class _Watched:
    process: ProcessId
    heartbeat: Heartbeat
    moved_at: float
    """Time at which its heartbeat last advanced."""
    answered_at: float


@dataclass
class HangDetector:
    """Follows the heartbeats of some processes and reports which of them hang.

    Time in which the detector itself did not run (a suspended job, a sleeping machine) does not count against the processes.

    Args:
        timeouts: The limits.
        clock: A monotonic clock, in seconds.
    """

    timeouts: HangTimeouts
    clock: Callable[[], float] = time.monotonic
    _watched: dict[int, _Watched] = field(default_factory=dict)
    _history: dict[str, float] = field(default_factory=dict)
    """Longest part seen by phase, also of processes that are gone."""
    _looked_at: float | None = None

    def record(self, process: ProcessId, heartbeat: Heartbeat) -> None:
        """Record the heartbeat that a process has answered with."""
        now, known = self.clock(), self._watched.get(process.rank)
        if known is None or known.process != process:
            self._watched[process.rank] = _Watched(process, heartbeat, now, now)
            return
        known.answered_at = now
        if heartbeat.beats != known.heartbeat.beats or heartbeat.phase != known.heartbeat.phase:
            known.moved_at = now
        known.heartbeat = heartbeat
        self._history[heartbeat.phase] = max(heartbeat.longest_s, self._history.get(heartbeat.phase, 0.0))

    def forget(self, processes: Iterable[ProcessId] | None = None) -> None:
        """Forget these processes, or all; the history of their phases stays."""
        gone = None if processes is None else set(processes)
        self._watched = {} if gone is None else {r: each for r, each in self._watched.items() if each.process not in gone}

    def tick(self) -> None:
        """Discount the time since the last call beyond ten polls; to be called every POLL_S."""
        now = self.clock()
        missed = 0.0 if self._looked_at is None else now - self._looked_at - 10 * POLL_S
        if missed > 0:
            for each in self._watched.values():
                each.moved_at = min(now, each.moved_at + missed)
                each.answered_at = min(now, each.answered_at + missed)
        self._looked_at = now

    def silent(self) -> list[ProcessId]:
        """Return the processes that have not answered for a while: they may be stopped."""
        now = self.clock()
        return [each.process for each in self._watched.values() if now - each.answered_at > self.timeouts.silent_s]

    def stopped(self, states: Mapping[ProcessId, str]) -> dict[ProcessId, str]:
        """Return the silent processes that are stopped, each with a message.

        Args:
            states: Kernel states by process; see `processes.states_of`.
        """
        now, found = self.clock(), dict[ProcessId, str]()
        for each in self._watched.values():
            if states.get(each.process) in ("T", "t"):
                found[each.process] = (
                    f"{each.process} is stopped (SIGSTOP, or a debugger): no answer for {now - each.answered_at:.0f} s "
                    f"while {_doing(each.heartbeat)}"
                )
        return found

    def hung(self) -> dict[ProcessId, str]:
        """Return the processes that made no progress for too long, each with a message; idle ones are not expected to."""
        now, found = self.clock(), dict[ProcessId, str]()
        for each in self._watched.values():
            still, bound = now - each.moved_at, self._bound(each.heartbeat)
            if each.heartbeat.phase != "idle" and still > bound:
                found[each.process] = (
                    f"{each.process} made no progress for {still:.0f} s while {_doing(each.heartbeat)} "
                    f"(the bound is {bound:.0f} s; ORCHESTRATOR_PATIENCE=3 waits three times as long)"
                )
        return found

    def _bound(self, heartbeat: Heartbeat) -> float:
        longest = max(heartbeat.longest_s if heartbeat.is_steady else 0.0, self._history.get(heartbeat.phase, 0.0))
        floor = self.timeouts.steady_s if longest and heartbeat.is_steady else self.timeouts.opening_s
        return max(floor, self.timeouts.factor * longest)


def _doing(heartbeat: Heartbeat) -> str:
    return f"{heartbeat.phase}, after step {heartbeat.step}" if heartbeat.step else heartbeat.phase
