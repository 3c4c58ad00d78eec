"""Passing on what happens in the exchange: to the view, and to the run's own record."""

from __future__ import annotations

import logging
import threading
from typing import Any

from ray.exceptions import RayError

from orchestrator.runtime.activities import with_steps
from orchestrator.runtime.cluster import fetch
from orchestrator.store import RunDirectory
from orchestrator.transfer.records import TrialRecord
from orchestrator.transfer.view import Activity, RunView

POLL_S = 0.3
LOOK_S = 5.0
"""How long the exchange may take to say what its gangs are doing: it is shown without that then."""
logger = logging.getLogger(__name__)


class Watcher:
    """Polls the exchange's news from a thread of its own until closed; nothing is told twice."""

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
        """What each gang is doing, trials with the step that they have reached. Nothing where the exchange does not answer."""
        try:
            found = fetch(self._exchange.activities.remote(), LOOK_S)
        except RayError:
            return ()
        return tuple(with_steps(activity, self._run.trials / activity.trial_id / "steps.jsonl") for activity in found)

    def _follow(self) -> None:
        while not self._done.wait(POLL_S):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        try:
            news = fetch(self._exchange.news.remote(self._seen), 30)
        except RayError:
            return  # the exchange is gone; whoever works with it hears of that
        for item in news:
            try:
                self._write(item)
            except OSError as error:  # a full disk, say: the same item is written when the next news are fetched
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
