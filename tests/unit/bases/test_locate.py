"""What `base.model` means, which files of it are fetched, and what a cache without the hub is good for."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from orchestrator.anatomy import read_anatomy
from orchestrator.bases import FolderBase, HubBase, folder_on_this_node, locate_base, located
from orchestrator.bases.files import loaded_files
from orchestrator.errors import BaseError
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec.models import BaseSpec
from orchestrator.work.execution import BaseLoad
from tests.hub_server import Content, Fault, HubServer
from tests.unit.bases.published import published

OTHER_FILES: dict[str, Content] = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "model.fp16.safetensors": b"another variant",
    "model-q4.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "figure.png": b"picture",
    "trainer_state.json": b"{}",
    ".gitattributes": b"",
}
SIDE_FILES: dict[str, Content] = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "1_Pooling/config.json": b"{}",
    "generation_config.json": b"{}",
    "LICENSE.txt": b"Apache License",
    "README.md": b"---\nlicense: mit\n---",
}


def quiet(message: str) -> None:
    pass


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return published(tmp_path / "published", num_shards=3)


def files_of(folder: Path) -> dict[str, Content]:
    return {path.name: path for path in folder.iterdir()}


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_a_path_that_exists_is_a_folder_whatever_it_looks_like(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    hub.add("org/model", {"config.json": b"{}"})
    assert locate_base(BaseSpec(model="org/model"), tmp_path) == FolderBase(tmp_path / "org" / "model")
    assert locate_base(BaseSpec(model="sample"), tmp_path) == FolderBase(Path(SAMPLE_BASE).resolve())
    assert hub.requests == []


@pytest.mark.parametrize("model", ["org/model", "gpt2", "Org-1/model_2.5-B"])
def test_what_has_the_shape_of_an_id_is_one(model: str, tmp_path: Path, hub: HubServer) -> None:
    commit = hub.add(model, {"config.json": b"{}"})
    base = locate_base(BaseSpec(model=model), tmp_path)
    assert isinstance(base, HubBase)
    assert (base.hub.repository.id, base.hub.sha) == (model, commit)


@pytest.mark.parametrize("model", ["./org/model", "../model", "/org/model", "~/no such folder", "a/b/c", "a--b", "my model"])
def test_other_text_is_a_path_and_a_missing_one_is_told(model: str, tmp_path: Path, hub: HubServer) -> None:
    with pytest.raises(BaseError, match="there is no such folder") as caught:
        locate_base(BaseSpec(model=model), tmp_path)
    assert "or the id of a model on the hub" in caught.value.expected
    assert hub.requests == []


def test_a_missing_id_is_told_with_the_folder_that_it_may_mean(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "models" / "llama-base").mkdir(parents=True)
    with pytest.raises(BaseError, match="the hub has no model of this id") as caught:
        locate_base(BaseSpec(model="models/lama-base"), tmp_path)
    wanted = f"or a folder; there is no folder {tmp_path}/models/lama-base; did you mean {tmp_path}/models/llama-base?"
    assert caught.value.expected.endswith(wanted)
    with pytest.raises(BaseError, match="there is no such folder") as caught:
        locate_base(BaseSpec(model="./models/lama-base"), tmp_path)
    assert f"did you mean {tmp_path}/models/llama-base?" in caught.value.remedy


def test_weights_tokenizer_and_small_files_are_fetched_and_nothing_else(tmp_path: Path, hub: HubServer, sharded: Path) -> None:
    weights = files_of(sharded)
    hub.add("org/model", weights | SIDE_FILES | OTHER_FILES)
    base = locate_base(BaseSpec(model="org/model"), tmp_path)
    small = names_in(base.for_data())
    assert small == {*SIDE_FILES, "config.json", "model.safetensors.index.json"}
    said: list[str] = []
    folder = base.for_training(said.append)
    assert names_in(folder) == {*weights, *SIDE_FILES}
    assert [line.partition(":")[0] for line in said] == [f"fetching org/model at {base.hub.sha[:12]} from the hub"]  # type: ignore[union-attr]
    assert read_anatomy(folder, need_weights=True).weight_files == read_anatomy(sharded, need_weights=True).weight_files
    num_requests = len(hub.requests)
    assert base.for_training(said.append) == base.for_data() == base.for_plan() == folder
    assert (len(hub.requests), len(said)) == (num_requests, 1)


def test_one_file_is_preferred_to_shards_as_transformers_does(tmp_path: Path, hub: HubServer, sharded: Path) -> None:
    whole = published(tmp_path / "whole", num_shards=1)
    hub.add("org/model", files_of(sharded) | files_of(whole))
    folder = locate_base(BaseSpec(model="org/model"), tmp_path).for_training(quiet)
    assert {name for name in names_in(folder) if name.endswith(".safetensors")} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("files", "what", "remedy"),
    [
        ({"pytorch_model.bin": b"x"}, "no safetensors weights: the weights that it has are pytorch_model.bin", "refs/pr/1"),
        ({"model-q4.gguf": b"x"}, "no safetensors weights: the weights that it has are model-q4.gguf", "refs/pr/1"),
        ({}, "no safetensors weights: it has no weights at all", "with safetensors"),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"},
            "holds a LoRA adapter",
            "that the adapter was trained on",
        ),
        (
            {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "one", "b": "two"}}).encode(), "one": b"x"},
            "1 of the 2 shards that model.safetensors.index.json names are not in the repository: two",
            "base.revision",
        ),
    ],
)
def test_a_repository_without_the_weights_is_refused(
    files: dict[str, Content], what: str, remedy: str, tmp_path: Path, hub: HubServer
) -> None:
    hub.add("org/model", {"config.json": b"{}", **files})
    base = locate_base(BaseSpec(model="org/model"), tmp_path)
    for step in (base.for_plan, lambda: base.for_training(quiet)):
        with pytest.raises(BaseError) as caught:
            step()
        assert what in caught.value.what
        assert remedy in caught.value.remedy


def test_what_hf_download_put_into_the_cache_is_enough_offline(
    tmp_path: Path, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", files_of(sharded) | SIDE_FILES)
    folder = Path(huggingface_hub.snapshot_download("org/model"))
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    base = locate_base(BaseSpec(model="org/model"), tmp_path)
    assert base.for_plan() == base.for_data() == base.for_training(quiet) == folder
    shard = folder / "shard-1.safetensors"
    shard.unlink()
    with pytest.raises(BaseError, match="a part of the weights is not in the hub's cache") as caught:
        base.for_training(quiet)
    assert "`hf download org/model`" in caught.value.remedy
    assert hub.requests == []


def test_offline_a_cache_without_licence_and_card_is_enough(
    tmp_path: Path, hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", files_of(sharded) | SIDE_FILES)
    base = locate_base(BaseSpec(model="org/model"), tmp_path)
    folder = base.for_training(quiet)
    for name in ("README.md", "LICENSE.txt", "tokenizer.model", "generation_config.json"):
        (folder / name).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert base.for_data() == base.for_training(quiet) == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BaseError, match="not in the hub's cache"):
        base.for_data()


def test_a_hub_that_is_down_is_not_needed_with_everything_cached(tmp_path: Path, hub: HubServer, sharded: Path) -> None:
    hub.add("org/model", files_of(sharded))
    folder = Path(huggingface_hub.snapshot_download("org/model"))
    hub.faults.append(Fault("", status=503))
    base = locate_base(BaseSpec(model="org/model"), tmp_path)
    assert base.for_plan() == folder


def test_a_recorded_base_is_the_same_commit_again(tmp_path: Path, hub: HubServer, sharded: Path) -> None:
    old = hub.add("org/model", files_of(sharded))
    base = locate_base(BaseSpec(model="org/model"), tmp_path)
    folder = base.for_training(quiet)
    load = BaseLoad(folder="/nowhere", model_type="llama", quantize="none", task="text").model_copy(update=base.origin)
    assert load.shown == f"org/model at {old[:12]}"
    hub.add("org/model", {"config.json": b"{}"})
    hub.requests.clear()
    assert located(load).for_training(quiet) == folder
    assert folder_on_this_node(load) == folder
    assert locate_base(BaseSpec(model="org/model"), tmp_path, commit=old).for_plan() == folder
    assert hub.requests == []


def test_a_node_whose_cache_lacks_the_base_uses_the_drivers_folder(hub: HubServer) -> None:
    load = BaseLoad(
        folder="/shared/base", model_type="llama", quantize="none", task="text", hub_id="org/model", revision="a" * 40
    )
    assert folder_on_this_node(load) == Path("/shared/base")
    assert folder_on_this_node(load.model_copy(update={"hub_id": ""})) == Path("/shared/base")
    assert located(load.model_copy(update={"hub_id": ""})) == FolderBase(Path("/shared/base"))


def test_nodes_compare_what_a_gang_reads(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "trainer_state.json", "README.md"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "tokenizer_old").mkdir()
    wanted = ["chat_template.jinja", "config.json", "tokenizer.json", "model.safetensors"]
    assert loaded_files(tmp_path, ["model.safetensors"]) == wanted
