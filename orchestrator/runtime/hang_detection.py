"""When a process that does not end is given up: it is stopped, or it has made no progress for too long.

What is too long comes from the process's own history: a multiple of the longest time that a part of the same phase has
taken. Where there is no history yet (loading, compiling, a first step), a bound of minutes holds.
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
"""How often whoever looks after processes asks them."""


class HangTimeouts(Value):
    """How long a process may go without progress, seconds."""

    silent_s: float = 20.0
    """Without any answer, before its node is asked whether it is stopped."""
    steady_s: float = 60.0
    """In a phase of many like parts, at least."""
    opening_s: float = 600.0
    """Where nothing is known yet of how long a part takes."""
    factor: float = 10.0
    """A part may take so many times as long as the longest before it."""
    load_bytes_per_s: float = 20e6
    """A base is read at least so fast, also over a slow network."""

    @staticmethod
    def from_environment() -> HangTimeouts:
        """The defaults, scaled by ORCHESTRATOR_PATIENCE: 3 waits three times as long, for slow storage or a debugger.

        Raises:
            UsageError: it is no positive number.
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
        """For processes that load a base of so many bytes."""
        return self.model_copy(update={"opening_s": self.opening_s + num_bytes / self.load_bytes_per_s})


class ProcessId(NamedTuple):
    """A process, and where it runs. Plain values, for it is sent."""

    rank: int
    host: str
    node_id: str
    pid: int
    started_at: int
    """As its kernel counts: with the pid it names one process for good."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass
class _Watched:
    process: ProcessId
    heartbeat: Heartbeat
    moved_at: float
    """When its heartbeat was last seen to move."""
    answered_at: float


@dataclass
class HangDetector:
    """Follows the heartbeats of some processes and says which of them hang.

    One that looks seldom, since it was stopped itself (a suspended job, a sleeping machine), blames nobody for that time.

    Args:
        timeouts: How long is too long.
        clock: Seconds that only go forward.
    """

    timeouts: HangTimeouts
    clock: Callable[[], float] = time.monotonic
    _watched: dict[int, _Watched] = field(default_factory=dict)
    _history: dict[str, float] = field(default_factory=dict)
    """By phase, the longest part of processes before these."""
    _looked_at: float | None = None

    def record(self, process: ProcessId, heartbeat: Heartbeat) -> None:
        """A process has answered."""
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
        """These processes are gone, or all; what was learned stays."""
        gone = None if processes is None else set(processes)
        self._watched = {} if gone is None else {r: each for r, each in self._watched.items() if each.process not in gone}

    def tick(self) -> None:
        """To be called every POLL_S: time in which nobody looked does not count."""
        now = self.clock()
        missed = 0.0 if self._looked_at is None else now - self._looked_at - 10 * POLL_S
        if missed > 0:
            for each in self._watched.values():
                each.moved_at = min(now, each.moved_at + missed)
                each.answered_at = min(now, each.answered_at + missed)
        self._looked_at = now

    def silent(self) -> list[ProcessId]:
        """Those that have not answered for long: they may be stopped."""
        now = self.clock()
        return [each.process for each in self._watched.values() if now - each.answered_at > self.timeouts.silent_s]

    def stopped(self, states: Mapping[ProcessId, str]) -> dict[ProcessId, str]:
        """Of those that are silent, which are stopped, and what to say of each.

        Args:
            states: As `processes.states_of` gives them.
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
        """Those that have made no progress for too long, and what to say of each; those that idle are not meant to."""
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
