"""News reach the run's record once each, also where it could not be written for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.runtime import run_progress as watch
from orchestrator.runtime.run_progress import Watcher

NEWS = [{"kind": "gang_ready", "message": str(number)} for number in range(3)]


def test_an_item_that_could_not_be_written_is_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    written, shown, failures = list[str](), list[str](), [OSError("no space left on device")]

    def event(_kind: str, *, message: str) -> None:
        if message == "1" and failures:
            raise failures.pop()
        written.append(message)

    def remote(since: int) -> list[dict[str, Any]]:
        return NEWS[since:]

    fetch: Callable[..., Any] = lambda call, _timeout: call  # noqa: E731
    monkeypatch.setattr(watch, "fetch", fetch)
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    exchange = SimpleNamespace(news=SimpleNamespace(remote=remote))
    view = SimpleNamespace(event=lambda _kind, message: shown.append(message))
    deadline = time.monotonic() + 20
    with Watcher(exchange, view, SimpleNamespace(event=event)):  # type: ignore[arg-type]
        while len(shown) < len(NEWS) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert failures == []
    assert written == shown == ["0", "1", "2"]
