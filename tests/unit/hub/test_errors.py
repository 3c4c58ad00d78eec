"""What the hub and the network do wrong, told as errors with a remedy."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable

import huggingface_hub.constants
import pytest

from orchestrator.errors import BaseError, DataError
from orchestrator.hub import Commit, Repository, fetch_files, read_range, resolve_commit
from tests.hub_server import SIGNATURE, Fault, HubServer, Sparse
from tests.unit.hub.fixtures import TOKEN

FILES = {"config.json": b"{}", "model.safetensors": Sparse(b"begin", 200_000)}


def resolve(revision: str = "") -> Commit:
    return resolve_commit(Repository("model", "org/model", revision, otherwise="a folder; there is none"))


def fetch() -> object:
    return fetch_files(resolve(), ["config.json"])


def read() -> object:
    return read_range(resolve(), "model.safetensors", 0, 1000)


def gated(hub: HubServer) -> None:
    hub.repositories["model", "org/model"].granted = {"another"}


def private(hub: HubServer) -> None:
    hub.repositories["model", "org/model"].readers = {"another"}


def gone(hub: HubServer) -> None:
    hub.repositories.clear()


def wrong_token(hub: HubServer) -> None:
    hub.tokens = {"another"}


def fails(part: str, **how: object) -> Callable[[HubServer], None]:
    def fail(hub: HubServer) -> None:
        hub.faults.append(Fault(part, **how))  # type: ignore[arg-type]

    return fail


CASES = {
    "missing": (gone, False, resolve, "has no model of this id, or it is private, and there is no token", "there is none"),
    "private": (private, True, resolve, "or the token of HF_TOKEN may not read it", "check the id"),
    "gated, no token": (gated, False, fetch, "is gated, and there is no token", "accept the terms at http"),
    "gated, token": (gated, True, fetch, "is gated, and the account of HF_TOKEN has not been granted", "/org/model, and try"),
    "gated, weights": (gated, True, read, "is gated", "accept the terms"),
    "wrong token": (wrong_token, True, resolve, "rejects the token of HF_TOKEN (401)", "hf auth login"),
    "forbidden": (
        fails("/api/", status=403),
        True,
        resolve,
        "the token of HF_TOKEN may not read this (403)",
        "with that permission",
    ),
    "rate": (
        fails("/api/", status=429, headers={"Retry-After": "7"}),
        False,
        resolve,
        "(429)",
        "wait 7 s and submit again, or set",
    ),
    "down": (fails("/api/", status=504), False, resolve, "status 504", "submit again later"),
    "cut": (fails("/cdn/", cut_after=100), False, read, "was cut again and again", "submit again"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_failure_is_told_with_its_remedy(case: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", FILES)
    spoil, has_token, act, what, remedy = CASES[case]
    spoil(hub)
    if has_token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(BaseError) as caught:
        act()
    text = str(caught.value)
    assert what in caught.value.what
    assert remedy in text
    assert "`hf download org/model`" in caught.value.remedy
    assert caught.value.where == f"org/model on {hub.url}"
    assert caught.value.exit_code == 2
    assert TOKEN not in text
    assert SIGNATURE not in text
    assert caught.value.__cause__ is None, "a traceback would show the client's text"
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    if has_token and hub.asked():
        assert {request.token for request in hub.asked("/api/")} == {TOKEN}


def test_a_revision_that_is_not_there(hub: HubServer) -> None:
    hub.add("org/model", FILES)
    with pytest.raises(BaseError, match="no revision v9") as caught:
        resolve("v9")
    assert "fix `base.revision`" in caught.value.remedy


def test_a_hub_that_does_not_answer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://user:password@127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    with pytest.raises(BaseError, match="the hub cannot be reached") as caught:
        resolve()
    assert "`hf download org/model`" in caught.value.remedy
    assert "there is none" in caught.value.expected
    assert "password" not in str(caught.value)


def test_offline_nothing_is_requested(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/model", FILES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseError, match=r"not in the hub's cache .* and HF_HUB_OFFLINE is set") as caught:
        resolve()
    assert "`hf download org/model`" in caught.value.remedy
    with pytest.raises(BaseError, match=r"1 of 1 files \(config\.json\) are not in the hub's cache"):
        fetch_files(resolve(commit), ["config.json"])
    assert hub.requests == []


def test_of_a_data_set_it_is_an_error_of_the_data(hub: HubServer) -> None:
    with pytest.raises(DataError, match="has no data set of this id") as caught:
        resolve_commit(Repository("dataset", "org/rows"))
    assert "`hf download org/rows --repo-type dataset`" in caught.value.remedy


def test_a_mistake_of_ours_is_not_told_as_the_hubs(hub: HubServer) -> None:
    hub.add("org/model", FILES)
    with pytest.raises(KeyError):
        fetch_files(resolve(), ["nothing.json"])
