"""Health checks of Ray's own processes during a run.

If a part of Ray that the driver depends on fails, Ray ends the driver without an explanation, or leaves it waiting. A thread
therefore checks that the node manager (raylet) and the control store (GCS) answer; if one does not, it prints an error and ends
the run first. It also ends stopped child processes of the driver, so that calls that wait for them fail instead of hanging.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray

from orchestrator.errors import TrainingError
from orchestrator.run.layout import RunFolder
from orchestrator.runtime.failures import GO_ON
from orchestrator.runtime.hang_detection import POLL_S, HangTimeouts, stat_of
from orchestrator.store import append_jsonl, unreachable

RAYLET_S = 3.0
"""Seconds that the node's own raylet may be unreachable: without it Ray soon ends the driver itself, without our message."""
GCS_S = 40.0
"""Seconds that the control store may be unreachable: it may be restarted, and after 60 s Ray ends the driver itself."""
SILENT_S = 45.0
"""Seconds that either may go without answering if connections to it are not refused."""
ANSWER_S = 8.0
MISSED_S = 4 * ANSWER_S
MACHINERY = 4
"""The exit code."""


class Guard:
    """A thread of the driver that checks Ray's node manager and control store.

    Args:
        run_folder: Named in the message.
        timeouts: Limits on how long a process may be stopped.
    """

    def __init__(self, run_folder: Path, timeouts: HangTimeouts) -> None:
        node_id = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
        self._places = {
            "Ray's node manager (raylet) on the driver's node": (
                f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}",
                RAYLET_S,
            ),
            "Ray's control store (GCS)": (ray.get_runtime_context().gcs_address, GCS_S),
        }
        self._folder = run_folder
        self._timeouts = timeouts
        self._lost_since: dict[str, float] = {}
        self._looked_at = time.monotonic()
        self._stopped_since: dict[tuple[int, int], float] = {}
        self._known: set[tuple[int, int]] = set()
        """Ray's processes that this driver has started itself, by (pid, start time)."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(ANSWER_S)

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            found = rays_processes(os.getpid())
            self._known |= found
            self._end_stopped(found)
            for name, (address, bound) in self._places.items():
                problem = unreachable(address, ANSWER_S)
                if problem is None:
                    self._lost_since.pop(name, None)
                elif self._closed.is_set():
                    return
                elif time.monotonic() - self._lost_since.setdefault(name, time.monotonic()) >= (
                    bound if problem.is_refused else SILENT_S
                ):
                    self._give_up(f"{name} is gone: {problem.reason}")

    def _end_stopped(self, found: set[tuple[int, int]]) -> None:
        """End Ray's processes that are stopped: the caller that waits for one then gets an error and restarts it, or fails.

        After a pause of this process itself nothing is ended: the others may be about to continue.
        """
        now, before = time.monotonic(), self._looked_at
        self._looked_at = now
        stopped = {one for one in found if stat_of(one[0])[0] == "T"} if now - before < MISSED_S else set()
        self._stopped_since = {one: self._stopped_since.get(one, now) for one in stopped}
        for (pid, _), since in self._stopped_since.items():
            if now - since > 2 * self._timeouts.silent_s:  # twice: a gang detects its own hung processes first
                self._record("hung", f"process {pid} is stopped; it is ended")
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _record(self, kind: str, message: str) -> None:
        with contextlib.suppress(OSError):
            append_jsonl(RunFolder(self._folder).events, {"time": time.time(), "kind": kind, "message": message})

    def _give_up(self, what: str) -> None:
        """Report the error, then end this process and those it has started, since calls to Ray may never return."""
        error = TrainingError(what, where=str(self._folder), remedy=GO_ON)
        self._record("ray_died", what)
        # By pid and start time: a pid alone may name another process by now.
        for pid, started_at in self._known:
            if stat_of(pid)[1] == started_at:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError, ValueError):  # the reader may be gone
            sys.stdout.flush()
        # A progress display hides the cursor, and `os._exit` skips the code that would show it again.
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{show_cursor}\nerror: {error}\n".encode())
        # `sys.exit` would end this thread only, and Ray's exit handlers would wait for the parts that are gone.
        os._exit(MACHINERY)


@contextlib.contextmanager
def guarded(run_folder: Path) -> Iterator[None]:
    """Check Ray's health while the block runs."""
    guard = Guard(run_folder, HangTimeouts.from_environment())
    guard.start()
    try:
        yield
    finally:
        guard.close()


def rays_processes(pid: int) -> set[tuple[int, int]]:
    """Return (pid, start time) of Ray's processes that a process has started, with their descendants; other children are not
    Ray's."""
    found: set[tuple[int, int]] = set()
    for child in descendants(pid):
        if child not in found and _is_rays(child[0]):
            found |= {child} | descendants(child[0])
    return found


def _is_rays(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(mark in command for mark in (b"ray::", b"raylet", b"gcs_server", b"/ray/"))


def descendants(pid: int) -> set[tuple[int, int]]:
    """Return (pid, start time) of all descendants of a process."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, front = set[int](), {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front} - found
        found |= front
    return {(child, stat_of(child)[1]) for child in found}
