"""The progress of a run: what it waits for is shown every second or so, so that no phase is silent."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ray.exceptions import RayError

from orchestrator.run.activities import on_disk, with_steps
from orchestrator.run.directory import RunDirectory
from orchestrator.run.layout import PROGRESS
from orchestrator.runtime.cluster import fetch
from orchestrator.store import write_json
from orchestrator.transfer.records import TrialRecord
from orchestrator.transfer.run_view import Activity, Progress, RunView

logger = logging.getLogger(__name__)
INTERVAL_S = 1.0
WRITE_S = 2.0
"""Seconds between two writes of progress.json."""

Look = Callable[[], tuple[Activity, ...]]


class ProgressReporter:
    """A `RunView` that forwards to another one and reports to it, from its own thread, what the run is waiting for.

    All calls go through one lock: the view below is never called by two threads at once.

    Args:
        view: The view that is shown.
        folder: The run's folder, which gets progress.json for `report --follow`; None for a run that has already ended.
        interval_s: Seconds between two reports.
    """

    def __init__(self, view: RunView, folder: Path | None, *, interval_s: float = INTERVAL_S) -> None:
        self._view, self._folder, self._interval_s = view, folder, interval_s
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._look: Look = self._look_on_disk
        self._phase, self._detail, self._last_event = "starting", "", ""
        self._began = self._phase_began = time.monotonic()
        self._phase_at = time.time()
        self._written = 0.0
        self._expected_end: float | None = None

    def __enter__(self) -> ProgressReporter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        why = "" if kind is None else str(error).partition("\n")[0] or kind.__name__
        self._write(self.now().model_copy(update={"ended": True, "error": why}))
        with self._lock:
            self._view.close()

    # -- calls of the run ------------------------------------------------------------------------------------------

    def start(self, *, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
        with self._lock:
            self._view.start(
                name=name,
                metric=metric,
                higher_is_better=higher_is_better,
                max_forgetting=max_forgetting,
                num_trials=num_trials,
            )

    def phase(self, name: str, detail: str = "") -> None:
        with self._lock:
            self._phase, self._detail, self._phase_began, self._phase_at = name, detail, time.monotonic(), time.time()
            self._expected_end = None
            self._view.phase(name, detail)

    def progress(self, now: Progress) -> None:
        with self._lock:
            self._view.progress(now)

    def trial(self, record: TrialRecord) -> None:
        with self._lock:
            self._view.trial(record)

    def event(self, kind: str, message: str, **fields: object) -> None:
        with self._lock:
            self._last_event = f"{kind}: {message}"
            hours = fields.get("wall_hours") if kind == "first_steps" else None
            if isinstance(hours, int | float):
                self._expected_end = self._phase_began + 3600 * hours
            self._view.event(kind, message, **fields)

    def close(self) -> None:
        """Do nothing: the reporter is closed when its block ends."""

    # -- what the run is waiting for ---------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, look: Look) -> Iterator[None]:
        """Ask `look` for what is being done while the block runs."""
        self._look = look
        try:
            yield
        finally:
            self._look = self._look_on_disk

    def now(self) -> Progress:
        """Return what the run is waiting for now."""
        with self._lock:
            phase, detail, began, end = self._phase, self._detail, self._phase_began, self._expected_end
        activities = self._look()
        now = time.monotonic()
        left = [activity.seconds_left for activity in activities if activity.seconds_left is not None]
        seconds_left = max(left, default=None) if phase in ("training", "refit") else end - now if end is not None else None
        return Progress(
            phase=phase,
            detail=detail,
            phase_seconds=now - began,
            run_seconds=now - self._began,
            activities=activities,
            seconds_left=seconds_left if seconds_left is None or seconds_left > 0 else None,
            at=time.time(),
            last_event=self._last_event,
        )

    def _look_on_disk(self) -> tuple[Activity, ...]:
        return on_disk(self._folder, self._phase, self._phase_at) if self._folder is not None else ()

    def _follow(self) -> None:
        while not self._over.wait(self._interval_s):
            try:
                now = self.now()
            except Exception:  # progress is a courtesy: it must not fail the run, and the next poll may succeed
                logger.debug("the current wait is unknown", exc_info=True)
                continue
            if time.monotonic() - self._written >= WRITE_S:
                self._write(now)
            with self._lock:
                # Asking took a moment: what belongs to a phase that has ended meanwhile is not shown.
                if not self._over.is_set() and now.phase == self._phase:
                    self._view.progress(now)

    def _write(self, now: Progress) -> None:
        if self._folder is None:
            return
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk: the run's own writes report it
            write_json(self._folder / PROGRESS, now)


POLL_S = 0.3
LOOK_S = 5.0
"""Seconds that the exchange may take to describe its gangs; progress is shown without them after that."""


class Watcher:
    """Polls the exchange's events from its own thread until closed; no event is reported twice."""

    def __init__(self, exchange: Any, view: RunView, run: RunDirectory) -> None:
        self._exchange = exchange
        self._view = view
        self._run = run
        self._seen = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def look(self) -> tuple[Activity, ...]:
        """Return what each gang is doing, trials with the step reached; empty if the exchange does not answer."""
        try:
            found = fetch(self._exchange.activities.remote(), LOOK_S)
        except RayError:
            return ()
        return tuple(with_steps(activity, self._run.steps(activity.trial_id)) for activity in found)

    def _follow(self) -> None:
        while not self._done.wait(POLL_S):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        try:
            news = fetch(self._exchange.news.remote(self._seen), 30)
        except RayError:
            return  # the exchange is gone: the calls that wait for it raise that
        for item in news:
            try:
                self._write(item)
            except OSError as error:  # a full disk, say: the item is retried with the next poll
                logger.warning("events.jsonl could not be written: %s", error)
                return
            self._seen += 1
            self._show(item)

    def _write(self, item: dict[str, Any]) -> None:
        record = item.get("record")
        if isinstance(record, TrialRecord):
            last = record.last
            self._run.event(
                "trial", trial_id=record.trial_id, state=record.state, rung=last.rung if last else None, reason=record.reason
            )
            return
        self._run.event(item["kind"], message=item["message"], **_fields(item))

    def _show(self, item: dict[str, Any]) -> None:
        record = item.get("record")
        if isinstance(record, TrialRecord):
            self._view.trial(record)
        else:
            self._view.event(item["kind"], item["message"], **_fields(item))


def _fields(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("kind", "message")}
