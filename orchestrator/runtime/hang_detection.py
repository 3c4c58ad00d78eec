"""Detect processes that hang, stopped ones and those that have made no progress for too long, and end them on their nodes.

The limit comes from the process's own history: a multiple of the longest time that a part of the same phase has taken. Without
a history (loading, compiling, a first step) it is minutes, since these can legitimately take that long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
        # Ten polls of tolerance, since asking the nodes delays a tick without anything being wrong.
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
            states: Kernel states by process; see `states_of`.
        """
        now, found = self.clock(), dict[ProcessId, str]()
        for each in self._watched.values():
            # `t`: stopped by a tracer, a debugger. A process that merely computes, or waits for a disk, is R, S or D.
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
        # A process that replaces another one is judged by its predecessor's history too.
        longest = max(heartbeat.longest_s if heartbeat.is_steady else 0.0, self._history.get(heartbeat.phase, 0.0))
        floor = self.timeouts.steady_s if longest and heartbeat.is_steady else self.timeouts.opening_s
        return max(floor, self.timeouts.factor * longest)


def _doing(heartbeat: Heartbeat) -> str:
    return f"{heartbeat.phase}, after step {heartbeat.step}" if heartbeat.step else heartbeat.phase


NODE_S = 20.0
"""Seconds that a node may take to answer."""


def own_process(rank: int = 0) -> ProcessId:
    """Return the identity of the calling process."""
    host, pid = socket.gethostname(), os.getpid()
    return ProcessId(rank, host, ray.get_runtime_context().get_node_id(), pid, stat_of(pid)[1])


def states_of(processes: Iterable[ProcessId]) -> dict[ProcessId, str]:
    """Return each one's state letter (`T`: stopped; empty: gone), without those whose node does not answer."""
    return dict(_asked(_states, processes))


def end_processes(processes: Iterable[ProcessId]) -> None:
    """Send SIGKILL, which ends a stopped process too; skip those that are gone or whose node does not answer."""
    _asked(_end, processes)


def _asked(what: Any, processes: Iterable[ProcessId]) -> list[tuple[ProcessId, str]]:
    """Call a function about the processes of each node on that node, and return its answers."""
    by_node: dict[str, list[ProcessId]] = defaultdict(list)
    for process in processes:
        by_node[process.node_id].append(process)
    here = ray.get_runtime_context().get_node_id()
    answers = [(by_node[here], what(by_node[here]))] if here in by_node else []
    for node, there in by_node.items():
        if node != here:
            with contextlib.suppress(RayError):  # a node that is gone has no processes
                answers.append((there, ray.get(_on(node, what, there), timeout=NODE_S)))
    return [pair for there, found in answers for pair in zip(there, found, strict=True)]


def _on(node_id: str, what: Any, processes: Sequence[ProcessId]) -> Any:
    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # No CPUs: on a full node the task would wait for the processes that it must end.
    return ray.remote(what).options(scheduling_strategy=place, num_cpus=0, max_retries=0).remote(processes)


def _states(processes: Sequence[ProcessId]) -> list[str]:
    return [_state(process) for process in processes]


def _end(processes: Sequence[ProcessId]) -> list[str]:
    for process in processes:
        if _state(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    return [""] * len(processes)


def _state(process: ProcessId) -> str:
    """Return the state letter; empty if the process is gone, also if another process has its pid now."""
    state, started_at = stat_of(process.pid)
    return state if started_at == process.started_at and state != "Z" else ""


def stat_of(pid: int) -> tuple[str, int]:
    """Return state and start time from /proc/PID/stat (proc(5): fields 3 and 22, counted after the name in parentheses)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", -1
    return fields[0], int(fields[19])
