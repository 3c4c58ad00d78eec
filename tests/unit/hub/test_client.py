"""Requests to the hub: commits, lists, files, parts of files."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from orchestrator.errors import BaseError
from orchestrator.hub import Commit, Repository, fetch_files, list_files, read_range, resolve_commit, snapshot_folder
from tests.hub_server import SIGNATURE, Fault, HubServer, Sparse
from tests.unit.hub.fixtures import TOKEN

MODEL = Repository("model", "org/model")
NUM_BYTES = 1_000_000


def test_a_revision_is_resolved_once_a_full_commit_never(hub: HubServer) -> None:
    old = hub.add("org/model", {"config.json": b"1"}, ref="v1")
    new = hub.add("org/model", {"config.json": b"2"})
    assert resolve_commit(MODEL).sha == new
    assert resolve_commit(Repository("model", "org/model", "v1")).sha == old
    assert len(hub.asked("/api/")) == 2
    assert resolve_commit(Repository("model", "org/model", old)).sha == old
    assert len(hub.requests) == 2


def test_offline_the_cache_knows_the_commit(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/model", {"config.json": b"1"})
    resolve_commit(MODEL)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_commit(MODEL).sha == commit


def test_files_are_listed_once_a_commit(hub: HubServer) -> None:
    hub.add("org/model", {"config.json": b"{}", "onnx/model.onnx": b"12345"})
    commit = resolve_commit(MODEL)
    assert list_files(commit) == {"config.json": 2, "onnx/model.onnx": 5}
    num_requests = len(hub.requests)
    assert list_files(commit) == {"config.json": 2, "onnx/model.onnx": 5}
    assert len(hub.requests) == num_requests


def test_only_missing_files_are_fetched(hub: HubServer) -> None:
    hub.add("org/model", {"a[1].json": b"a", "a1.json": b"other", "b.json": b"b"})
    commit = resolve_commit(MODEL)
    folder = fetch_files(commit, ["a[1].json"])
    assert folder == snapshot_folder(commit)
    assert [path.name for path in folder.iterdir()] == ["a[1].json"]
    fetch_files(commit, ["a[1].json", "b.json"])
    assert [request.path.rpartition("/")[2] for request in hub.asked("/resolve/", "GET")] == ["a%5B1%5D.json", "b.json"]
    num_requests = len(hub.requests)
    assert (fetch_files(commit, ["a[1].json", "b.json"]) / "b.json").read_bytes() == b"b"
    assert len(hub.requests) == num_requests


def test_a_cut_connection_is_resumed_where_it_broke(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("org/model", {"model.safetensors": Sparse(b"begin", NUM_BYTES)})
    hub.faults.append(Fault("/cdn/", cut_after=NUM_BYTES // 2, times=1))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.INFO)
    folder = fetch_files(resolve_commit(MODEL), ["model.safetensors"])
    assert (folder / "model.safetensors").stat().st_size == NUM_BYTES
    assert NUM_BYTES <= hub.bytes_of("/cdn/") < NUM_BYTES + (1 << 17), "the first half was not sent again"
    assert "Trying to resume" in caplog.text
    assert "/cdn/" in caplog.text, "httpx logs every request"
    assert SIGNATURE not in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("whole", [False, True])
def test_a_part_of_a_file_costs_no_more_than_itself(whole: bool, hub: HubServer) -> None:
    begin = bytes(range(256)) * 10
    hub.add("org/model", {"model.safetensors": Sparse(begin, 1 << 40)})
    hub.faults.append(Fault("/cdn/", whole=whole))
    commit = resolve_commit(MODEL)
    assert read_range(commit, "model.safetensors", 300, 1000) == begin[300:1000]
    assert read_range(commit, "model.safetensors", 0, 8) == begin[:8]
    # A server that ignores the range has sent what fits into the buffers between, when the client hangs up.
    assert hub.bytes_of("/cdn/") == 708 or (whole and hub.bytes_of("/cdn/") < 64 << 20)


def test_a_part_is_asked_for_again_where_the_connection_is_cut(hub: HubServer) -> None:
    hub.add("org/model", {"model.safetensors": Sparse(b"0123456789", NUM_BYTES)})
    hub.faults.append(Fault("/cdn/", cut_after=3, times=2))
    assert read_range(resolve_commit(MODEL), "model.safetensors", 2, 8) == b"234567"


def test_a_file_that_does_not_fit_is_not_begun(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", {"model.safetensors": Sparse(b"", 5 << 40)})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1 << 30))
    with pytest.raises(BaseError, match=r"to fetch, and .* free in the hub") as caught:
        fetch_files(resolve_commit(MODEL), ["model.safetensors"])
    assert "HF_HUB_CACHE" in caught.value.remedy
    assert hub.asked("/resolve/") == []


def test_a_repository_without_an_organisation(hub: HubServer) -> None:
    sha = hub.add("gpt2", {"config.json": b"{}", "model.safetensors": Sparse(b"abc", NUM_BYTES)})
    commit = resolve_commit(Repository("model", "gpt2"))
    assert commit == Commit(Repository("model", "gpt2"), sha)
    assert read_range(commit, "model.safetensors", 0, 3) == b"abc"
    assert (Path(fetch_files(commit, ["config.json"])) / "config.json").read_bytes() == b"{}"
