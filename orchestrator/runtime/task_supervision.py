"""Looking after processes that are not a gang's: the ranks of a refit, and tasks. Each sends its pulse; who hangs is ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import TrainingError
from orchestrator.run.directory import RunDirectory
from orchestrator.runtime.cluster import fetch
from orchestrator.runtime.failures import GO_ON, describe
from orchestrator.runtime.hang_detection import POLL_S, Patience, Seat, Vigil
from orchestrator.runtime.processes import end_processes, own_seat, states_of
from orchestrator.train import pulse
from orchestrator.train.pulse import Pulse

MOST_S = 30.0
"""What one look may take: a node may have to be asked."""
MAX_STARTS = 3
"""How often a task is started whose process was ended, by whomever."""


class PulseBoard:
    """An actor beside the driver: the last pulse of each process."""

    def __init__(self) -> None:
        self._notes: dict[Seat, tuple[int, Pulse]] = {}

    def note(self, seat: Seat, number: int, found: Pulse) -> None:
        self._notes[seat] = (number, found)

    def read(self) -> dict[Seat, tuple[int, Pulse]]:
        return self._notes


def send_pulses(board: Any, rank: int) -> None:
    """Have a thread of this process send its pulse to the board for as long as it lives."""
    seat = own_seat(rank)

    def send() -> None:
        number = 0
        while True:
            number += 1
            try:
                board.note.remote(seat, number, pulse.look())
            except Exception:  # Ray is ending, and with it this process
                return
            time.sleep(POLL_S)

    threading.Thread(target=send, name="pulse", daemon=True).start()


class Minder:
    """From the driver, while a block runs: ends processes that are stopped or make no progress.

    Ray sees that they died, and starts them again where it was told to.

    Args:
        run: Where each is written down, as `hung`.
        patience: How long is too long.
        progress: Whether lack of progress counts too, beside being stopped.
    """

    def __init__(self, run: RunDirectory, patience: Patience, *, progress: bool = True) -> None:
        self._run = run
        self._vigil = Vigil(patience)
        self._progress = progress
        self._numbers: dict[Seat, int] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="minder", daemon=True)
        self.board: Any = None
        self.said: list[str] = []
        """What was said of each process that was ended."""

    def __enter__(self) -> Minder:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(PulseBoard)
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
            with contextlib.suppress(RayError, OSError):  # where Ray itself is gone, whoever waits hears of it
                self._look()

    def _look(self) -> None:
        for seat, (number, found) in fetch(self.board.read.remote(), 10).items():
            if self._numbers.get(seat) != number:
                self._numbers[seat] = number
                self._vigil.hear(Seat(*seat), Pulse(*found))
        self._vigil.look()
        states = states_of(self._vigil.silent())
        self._vigil.forget(seat for seat, state in states.items() if not state)
        found = self._vigil.stopped(states) or (self._vigil.hung() if self._progress else {})
        if found and not self._closed.is_set():
            end_processes(found)
            self._vigil.forget(found)
            for said in found.values():
                self.said.append(said)
                self._run.event("hung", message=f"{said}; it is ended")


def run_task(minder: Minder, doing: str, task: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process of its own, and again where that process was ended from outside.

    Args:
        doing: What the process does, as its phase.
        task: `ray.remote(in_a_minded_process)` with its options.

    Raises:
        TrainingError: it was ended MAX_STARTS times.
    """
    for _ in range(MAX_STARTS - 1):
        with contextlib.suppress(WorkerCrashedError):
            return fetch(task.remote(minder.board, doing, function, *arguments))
    try:
        return fetch(task.remote(minder.board, doing, function, *arguments))
    except WorkerCrashedError as error:
        why = minder.said[-1] if minder.said else describe(error)
        raise TrainingError(f"the process for {doing} was ended {MAX_STARTS} times, the last: {why}", remedy=GO_ON) from None


def in_a_minded_process(board: Any, doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The task itself."""
    send_pulses(board, 0)
    pulse.enter(doing)
    return function(*arguments)
