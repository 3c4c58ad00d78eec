"""Planning from headers: the same anatomy as from the weights, of which nothing is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.bases import locate_base
from orchestrator.bases.headers import FIRST_BYTES
from orchestrator.errors import BaseError
from orchestrator.spec.models import BaseSpec
from tests.hub_models import sparse_base
from tests.hub_server import HubServer, Sparse
from tests.unit.bases.published import published

SPEC = BaseSpec(model="org/model")


def without_folder(anatomy: ModelAnatomy) -> ModelAnatomy:
    return anatomy.model_copy(update={"folder": ""})


@pytest.mark.parametrize("num_shards", [1, 3])
def test_headers_say_what_the_weights_say(num_shards: int, tmp_path: Path, hub: HubServer) -> None:
    folder = published(tmp_path / "published", num_shards)
    hub.add_folder("org/model", folder)
    found = locate_base(SPEC, tmp_path).anatomy()
    assert without_folder(found) == without_folder(read_anatomy(folder, need_weights=True))
    assert found.has_weights


def test_nothing_is_read_twice(tmp_path: Path, hub: HubServer) -> None:
    commit = hub.add("org/model", sparse_base(published(tmp_path / "published", 1), shard_bytes=4_000))
    first = locate_base(SPEC, tmp_path).anatomy()
    assert len(first.weight_files) > 3
    hub.requests.clear()
    assert locate_base(SPEC, tmp_path).anatomy() == first
    assert [request.path for request in hub.requests] == ["/api/models/org/model"], "which commit main is now"
    hub.requests.clear()
    assert locate_base(BaseSpec(model="org/model", revision=commit), tmp_path).anatomy() == first
    assert hub.requests == []


def test_another_commit_is_read_anew(tmp_path: Path, hub: HubServer) -> None:
    folder = published(tmp_path / "published", 1)
    hub.add("org/model", sparse_base(folder), ref="v1")
    locate_base(SPEC.model_copy(update={"revision": "v1"}), tmp_path).anatomy()
    hub.add("org/model", {**sparse_base(folder), "README.md": b"new"})
    base = locate_base(SPEC, tmp_path)
    assert base.anatomy().folder.endswith(f"{base.hub.sha}/headers")  # type: ignore[union-attr]


def test_files_that_left_the_hubs_cache_are_read_again(tmp_path: Path, hub: HubServer) -> None:
    hub.add("org/model", sparse_base(published(tmp_path / "published", 1)))
    first = locate_base(SPEC, tmp_path).anatomy()
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    assert locate_base(SPEC, tmp_path).anatomy() == first


def test_a_header_longer_than_the_first_request(tmp_path: Path, hub: HubServer) -> None:
    folder = published(tmp_path / "published", 1)
    files = sparse_base(folder)
    (name,) = (name for name in files if name.endswith(".safetensors"))
    small = files[name]
    assert isinstance(small, Sparse)
    # The format pads a header with blanks.
    blanks = b" " * (2 * FIRST_BYTES)
    length = (len(small.begin) - 8 + len(blanks)).to_bytes(8, "little")
    files[name] = Sparse(length + small.begin[8:] + blanks, small.size + len(blanks))
    hub.add("org/model", files)
    assert without_folder(locate_base(SPEC, tmp_path).anatomy()) == without_folder(read_anatomy(folder, need_weights=True))
    assert hub.bytes_of(name) == len(files[name].begin)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (Sparse(b"not safetensors at all", 1 << 20), "not a safetensors file"),
        (Sparse(b"abc", 3), "truncated: 3 bytes"),
        (Sparse((1 << 10).to_bytes(8, "little"), 200), "truncated within its header"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(content: Sparse, what: str, tmp_path: Path, hub: HubServer) -> None:
    folder = published(tmp_path / "published", 1)
    hub.add("org/model", {"config.json": folder / "config.json", "model.safetensors": content})
    with pytest.raises(BaseError, match=what):
        locate_base(SPEC, tmp_path).anatomy()
