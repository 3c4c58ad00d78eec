"""Data sets of the hub, by the real `datasets` library from a server on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from datasets import config as settings

from orchestrator.data.reading.gather import find_sources, read_examples
from orchestrator.data.reading.hub_data import find_hub_data
from orchestrator.data.reading.measure import measure_data
from orchestrator.data.summary import LeftOut
from orchestrator.errors import DataError
from orchestrator.spec import LoadedSpec
from orchestrator.spec.hub_ids import HubData, parse_hub_data
from orchestrator.spec.loader import load_values
from tests.hub_server import HubServer
from tests.unit.hub.fixtures import hub as served

__all__ = ["served"]
TWO_CONFIGS = b"""---
configs:
- {config_name: easy, data_files: easy.jsonl}
- {config_name: hard, data_files: [{split: train, path: hard.jsonl}, {split: odd, path: odd.jsonl}]}
---
"""


def rows(count: int, word: str) -> bytes:
    lines = [json.dumps({"prompt": f"{word} {number}", "completion": f"answer {number}"}) for number in range(count)]
    return "\n".join(lines).encode()


@pytest.fixture
def hub(served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setattr(settings, "HF_ENDPOINT", served.url)
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    served.add("org/rows", {"train.jsonl": rows(30, "one"), "test.jsonl": rows(8, "two"), "README.md": b""}, kind="dataset")
    served.add(
        "org/configs",
        {"README.md": TWO_CONFIGS, "easy.jsonl": rows(5, "a"), "hard.jsonl": rows(6, "b"), "odd.jsonl": rows(7, "c")},
        kind="dataset",
    )
    return served


def spec(folder: Path, **data: Any) -> LoadedSpec:
    return load_values({"name": "x", "base": {"model": "sample"}, "task": "completion", "data": data}, folder)


def read(loaded: LoadedSpec) -> dict[str, list[str]]:
    sources = find_sources(loaded)
    found = read_examples(loaded.spec, sources, LeftOut(loaded.folder))
    return {name: [str(example.prompt) for example in examples] for name, examples in found.items()}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("hub:org/rows", HubData("org/rows")),
        ("hub:squad@v1.0", HubData("squad", "v1.0")),
        ("hub:org/rows@refs/pr/1:config", HubData("org/rows", "refs/pr/1", "config")),
        ("hub:org/rows:a config/test", HubData("org/rows", "", "a config", "test")),
        ("hub:org/rows:/test", HubData("org/rows", "", "", "test")),
        ("hub:a/b/c", None),
        ("hub:", None),
        ("hub:org/rows:a/b/c", None),
        ("hub:org/rows@", None),
        ("org/rows", None),
    ],
)
def test_the_shape_of_a_name(path: str, meant: HubData | None) -> None:
    assert parse_hub_data(path) == meant


def test_the_splits_of_a_data_set_are_those_of_the_run(hub: HubServer, tmp_path: Path) -> None:
    found = read(spec(tmp_path, train="hub:org/rows"))
    assert {name: len(prompts) for name, prompts in found.items()} == {"train": 30, "test": 8}
    assert found["test"][3] == "two 3"


def test_a_config_and_a_split_of_one_name_are_kept_apart(hub: HubServer) -> None:
    card = (
        b"---\nconfigs:\n- {config_name: train, data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]}\n---\n"
    )
    hub.add("org/train", {"README.md": card, "a.jsonl": rows(5, "a"), "b.jsonl": rows(6, "b")}, kind="dataset")
    assert set(find_hub_data("hub:org/train:train")[0]) == {"train", "test"}
    assert set(find_hub_data("hub:org/train:/train")[0]) == {"train"}


def test_a_config_and_a_split_are_chosen(hub: HubServer, tmp_path: Path) -> None:
    found = read(spec(tmp_path, train="hub:org/configs:hard/train", eval="hub:org/configs:easy", test="hub:org/rows:/test"))
    assert {name: (len(prompts), prompts[0]) for name, prompts in found.items()} == {
        "train": (6, "b 0"),
        "eval": (5, "a 0"),
        "test": (8, "two 0"),
    }


def test_a_second_time_only_the_commit_is_asked_for(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = spec(tmp_path, train="hub:org/rows")
    size = measure_data(loaded).size
    assert size.train_documents == 27, "a tenth for the missing eval split"
    hub.requests.clear()
    assert measure_data(loaded).size == size
    assert {request.path for request in hub.requests} == {"/api/datasets/org/rows"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert measure_data(loaded).size == size


def test_the_commit_is_told_and_a_revision_pins_it(hub: HubServer, tmp_path: Path) -> None:
    old = hub.repositories["dataset", "org/rows"].refs["main"]
    hub.add("org/rows", {"train.jsonl": rows(3, "new")}, kind="dataset")
    left_out = LeftOut(tmp_path)
    sources = find_sources(spec(tmp_path, train=f"hub:org/rows@{old}"), left_out)
    assert sum(len(entry.files) for entry in sources["train"]) == 1
    assert [notice.line for notice in left_out.notices if "commit" in notice.line] == [
        f"hub:org/rows@{old} is read at commit {old[:12]} of its repository"
    ]
    assert len(read(spec(tmp_path, train=f"hub:org/rows@{old}"))["train"]) == 30
    assert len(read(spec(tmp_path, train="hub:org/rows"))["train"]) == 3


def test_a_bad_row_is_named(hub: HubServer, tmp_path: Path) -> None:
    content = rows(4, "a") + b'\n{"prompt": null, "completion": null}'
    hub.add("org/bad", {"train.jsonl": content}, kind="dataset")
    with pytest.raises(DataError, match=r"bad-train\.arrow:5"):
        read(spec(tmp_path, train="hub:org/bad"))


@pytest.mark.parametrize(
    ("path", "what", "remedy"),
    [
        ("hub:org/nothing", "the hub has no data set of this id", "hf download org/nothing --repo-type dataset"),
        ("hub:org/rows@v9", "no revision v9", "after @"),
        ("hub:org/rows:/dev", "no split 'dev'", "write hub:org/rows:/"),
        ("hub:org/rows:other", "no config 'other'", "write hub:org/rows:default"),
        ("hub:org/configs", "2 configs, and none is named", "write hub:org/configs:easy"),
        ("hub:org/configs:hard", "a split 'odd'", "for example hub:org/configs:hard/odd"),
        ("hub:org/broken", "the `datasets` library cannot read it", "hf download"),
        ("hub:org/empty", "the `datasets` library cannot read it", "hf download"),
        ("hub:org/script", "the `datasets` library cannot read it", "hf download"),
    ],
)
def test_what_cannot_be_read_is_told(path: str, what: str, remedy: str, hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/broken", {"train.jsonl": b'{"a": 1}\nnot JSON'}, kind="dataset")
    hub.add("org/empty", {"README.md": b""}, kind="dataset")
    hub.add("org/script", {"script.py": b"import os"}, kind="dataset")
    with pytest.raises(DataError) as caught:
        find_sources(spec(tmp_path, train=path))
    assert what in caught.value.what
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 2


def test_a_gated_data_set(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["dataset", "org/rows"].granted = set()
    with pytest.raises(DataError, match="is gated") as caught:
        find_sources(spec(tmp_path, train="hub:org/rows"))
    assert "/datasets/org/rows" in caught.value.remedy


def test_offline_another_commit_in_the_cache_is_not_taken(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_sources(spec(tmp_path, train="hub:org/rows"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="has another commit than aaaaaaaaaaaa"):
        find_sources(spec(tmp_path, train=f"hub:org/rows@{'a' * 40}"))


def test_a_saved_copy_reads_alike(hub: HubServer, tmp_path: Path) -> None:
    datasets.Dataset.from_list([json.loads(line) for line in rows(30, "one").splitlines()]).save_to_disk(tmp_path / "saved")
    assert read(spec(tmp_path, train="saved"))["train"] == read(spec(tmp_path, train="hub:org/rows:/train"))["train"]
