"""Addresses of clusters that are gone are found out within seconds, whatever answers there."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from orchestrator.cli.commands import main
from orchestrator.store import unreachable

SOON_S = 0.5


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """A port that answers in another language, as a dashboard does."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def unused() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "reason", "remedy"),
    [
        ("no-such-host.invalid:6379", "no-such-host.invalid", "head"),
        ("ray://127.0.0.1:10001", "Ray Client", "ray job submit"),
        ("http://127.0.0.1:8265", "dashboard", "ray job submit --address http://127.0.0.1:8265"),
        ("just-a-name", "not a host and a port", "HOST:PORT"),
        ("127.0.0.1:99999", "not a host and a port", "HOST:PORT"),
        ("127.0.0.1:0", "not a host and a port", "HOST:PORT"),
        ("", "not a host and a port", "HOST:PORT"),
        ("[::1]:1", "no connection", "unset RAY_ADDRESS"),
    ],
)
def test_an_address_that_leads_nowhere_is_named_with_what_to_do(address: str, reason: str, remedy: str) -> None:
    found = unreachable(address, 5)
    assert found is not None
    assert reason in found.reason
    assert remedy in found.remedy


def test_what_answers_is_looked_at(silent: str, web: str) -> None:
    refused = unreachable(unused(), SOON_S)
    assert refused is not None
    assert "refused" in refused.reason
    mute = unreachable(silent, SOON_S)
    assert mute is not None
    assert "nothing answered" in mute.reason
    other = unreachable(web, 5)
    assert other is not None
    assert "not Ray's control store" in other.reason


@pytest.mark.parametrize("address", ["auto", "local"])
def test_what_ray_alone_can_tell_is_left_to_it(address: str) -> None:
    assert unreachable(address) is None


def test_doctor_says_it_too(silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")  # the option sets it for Ray; put back after the test
    started = time.monotonic()
    with pytest.raises(SystemExit):
        main(["doctor", "--json", "--address", silent])
    assert time.monotonic() - started < 30
    said = capsys.readouterr().out
    assert silent in said
    assert "nothing answered" in said
