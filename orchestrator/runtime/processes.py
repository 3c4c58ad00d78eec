"""Processes of a run, seen and ended on the nodes where they are.

A process that is stopped answers no call, so that Ray cannot end it either: its node's kernel can.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.runtime.hang_detection import ProcessId

NODE_S = 20.0
"""How long a node may take to answer."""


def own_process(rank: int = 0) -> ProcessId:
    """Of the process that calls."""
    host, pid = socket.gethostname(), os.getpid()
    return ProcessId(rank, host, ray.get_runtime_context().get_node_id(), pid, stat_of(pid)[1])


def states_of(processes: Iterable[ProcessId]) -> dict[ProcessId, str]:
    """The kernel's letter for each (`T`: stopped; empty: gone); those whose node does not answer are left out."""
    return dict(_asked(_states, processes))


def end_processes(processes: Iterable[ProcessId]) -> None:
    """SIGKILL, which ends a stopped process too. What is gone already, or whose node does not answer, is left."""
    _asked(_end, processes)


def _asked(what: Any, processes: Iterable[ProcessId]) -> list[tuple[ProcessId, str]]:
    """What a function says about processes, each called on its node."""
    by_node: dict[str, list[ProcessId]] = defaultdict(list)
    for process in processes:
        by_node[process.node_id].append(process)
    here = ray.get_runtime_context().get_node_id()
    answers = [(by_node[here], what(by_node[here]))] if here in by_node else []
    for node, there in by_node.items():
        if node != here:
            with contextlib.suppress(RayError):  # a node that is gone has no processes
                answers.append((there, ray.get(_on(node, what, there), timeout=NODE_S)))
    return [pair for there, said in answers for pair in zip(there, said, strict=True)]


def _on(node_id: str, what: Any, processes: Sequence[ProcessId]) -> Any:
    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
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
    """Empty where the process is gone, also where another has its pid."""
    state, started_at = stat_of(process.pid)
    return state if started_at == process.started_at and state != "Z" else ""


def stat_of(pid: int) -> tuple[str, int]:
    """State and start time by /proc/PID/stat (proc(5): fields 3 and 22, counted behind the name in parentheses)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", -1
    return fields[0], int(fields[19])
