"""A watchdog for the processes outside gangs, the ranks of a refit and tasks: each sends heartbeats; a hung one is ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import TrainingError
from orchestrator.run.directory import RunDirectory
from orchestrator.run.hours import metered
from orchestrator.runtime.cluster import fetch
from orchestrator.runtime.failures import GO_ON, describe
from orchestrator.runtime.hang_detection import (
    POLL_S,
    HangDetector,
    HangTimeouts,
    ProcessId,
    end_processes,
    own_process,
    states_of,
)
from orchestrator.train import heartbeat
from orchestrator.train.heartbeat import Heartbeat

MOST_S = 30.0
"""Upper bound on the seconds of one check, in which a node may have to be asked."""
MAX_STARTS = 3
"""Starts of a task whose process was ended from outside."""


class HeartbeatBoard:
    """An actor on the driver's node that holds the last heartbeat of each process."""

    def __init__(self) -> None:
        self._notes: dict[ProcessId, tuple[int, Heartbeat]] = {}

    def note(self, process: ProcessId, number: int, found: Heartbeat) -> None:
        self._notes[process] = (number, found)

    def read(self) -> dict[ProcessId, tuple[int, Heartbeat]]:
        return self._notes


def send_heartbeats(board: Any, rank: int) -> None:
    """Start a thread that sends this process's heartbeat to the board for as long as the process lives."""
    process = own_process(rank)

    def send() -> None:
        number = 0
        while True:
            number += 1
            try:
                # Not awaited: a slow board must not hold up the process; the next heartbeat replaces this one.
                board.note.remote(process, number, heartbeat.look())
            except Exception:  # Ray is ending, and with it this process
                return
            time.sleep(POLL_S)

    threading.Thread(target=send, name="heartbeat", daemon=True).start()


class Watchdog:
    """Ends, from the driver and while a block runs, processes that are stopped or make no progress.

    Ray notices that they ended, and restarts them if it is configured to.

    Args:
        run: The run whose events record each, as `hung`.
        timeouts: The limits on time without progress.
        progress: Whether missing progress counts too, not only being stopped.
    """

    def __init__(self, run: RunDirectory, timeouts: HangTimeouts, *, progress: bool = True) -> None:
        self._run = run
        self._detector = HangDetector(timeouts)
        self._progress = progress
        self._numbers: dict[ProcessId, int] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="watchdog", daemon=True)
        self.board: Any = None
        self.messages: list[str] = []
        """The messages about the processes that were ended."""

    def __enter__(self) -> Watchdog:
        # On the driver's node: the board must not be lost with a node that only trains.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(HeartbeatBoard)
        self.board = actor.options(num_cpus=0, scheduling_strategy=here).remote()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(MOST_S)
        with contextlib.suppress(Exception):
            ray.kill(self.board)

    def _look_after(self) -> None:
        while not self._closed.wait(POLL_S):
            with contextlib.suppress(RayError, OSError):  # if Ray itself is gone, the calls that wait for it raise that
                self._look()

    def _look(self) -> None:
        for process, (number, found) in fetch(self.board.read.remote(), 10).items():
            # The board returns the last note again and again; only a new number is a sign of life.
            if self._numbers.get(process) != number:
                self._numbers[process] = number
                self._detector.record(ProcessId(*process), Heartbeat(*found))
        self._detector.tick()
        states = states_of(self._detector.silent())
        self._detector.forget(process for process, state in states.items() if not state)
        found = self._detector.stopped(states) or (self._detector.hung() if self._progress else {})
        # Not after the block has ended: its processes end by themselves then, and silence is no hang.
        if found and not self._closed.is_set():
            end_processes(found)
            self._detector.forget(found)
            for message in found.values():
                self.messages.append(message)
                self._run.event("hung", message=f"{message}; it is ended")


@contextmanager
def watched(run: RunDirectory, timeouts: HangTimeouts, num_ranks: int, *, progress: bool = True) -> Iterator[Watchdog]:
    """Look after the processes of a block, and count the hours of its ranks; arguments as `Watchdog`'s."""
    watchdog = Watchdog(run, timeouts, progress=progress)
    with metered(run.hours, num_ranks), watchdog:
        yield watchdog


def run_task(watchdog: Watchdog, doing: str, task: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in its own process, and again if that process was ended from outside.

    Args:
        doing: The phase that the process reports.
        task: `ray.remote(run_with_heartbeats)`, with its options.

    Raises:
        TrainingError: it was ended MAX_STARTS times.
    """
    for _ in range(MAX_STARTS - 1):
        with contextlib.suppress(WorkerCrashedError):
            return fetch(task.remote(watchdog.board, doing, function, *arguments))
    try:
        return fetch(task.remote(watchdog.board, doing, function, *arguments))
    except WorkerCrashedError as error:
        why = watchdog.messages[-1] if watchdog.messages else describe(error)
        raise TrainingError(f"the process for {doing} was ended {MAX_STARTS} times, the last: {why}", remedy=GO_ON) from None


def run_with_heartbeats(board: Any, doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run the function in this process while its heartbeats are sent."""
    send_heartbeats(board, 0)
    heartbeat.enter(doing)
    return function(*arguments)
