"""Which files are read of a path, a folder or a glob, which split each belongs to, and what is told of the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from orchestrator.data.reading.files import find_files, split_of
from orchestrator.data.reading.gather import find_sources
from orchestrator.data.summary import LeftOut
from orchestrator.errors import DataError
from tests.unit.data.reading import write


def names(folder: Path, pattern: str = "") -> dict[str, list[str]]:
    found = find_files(str(folder / pattern))
    return {split: [str(path.relative_to(folder)) for path in files] for split, files in found.files.items()}


def fill(folder: Path, *files: str) -> Path:
    for number, name in enumerate(files):
        write(folder / name, json.dumps({"prompt": f"p{number}", "completion": name}) + "\n")
    return folder


def test_files_are_found_by_path_folder_and_glob(tmp_path: Path) -> None:
    fill(tmp_path, "b.jsonl", "a.jsonl.gz", "deep/c.csv", "notes.docx", "README.md", ".hidden.jsonl", "c.jsonl~", "d.bak")
    assert names(tmp_path, "b.jsonl") == {"": ["b.jsonl"]}
    assert names(tmp_path, "*.jsonl*") == {"": ["a.jsonl.gz", "b.jsonl"]}
    assert names(tmp_path, "**/*.csv") == {"": ["deep/c.csv"]}
    assert names(tmp_path) == {"": ["a.jsonl.gz", "b.jsonl", "deep/c.csv"]}
    found = find_files(str(tmp_path))
    assert found.skipped == {
        "backup and temporary files": ["c.jsonl~", "d.bak"],
        "files about the data": ["README.md"],
        "files of other kinds": ["notes.docx"],
        "hidden files": [".hidden.jsonl"],
    }


def test_hidden_folders_texts_archives_and_links_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "data", "a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "LICENSE.txt", "story.txt", "b.zip")
    fill(tmp_path / "other", "far.jsonl")
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    assert names(folder) == {"": ["a.jsonl", "linked/far.jsonl"]}
    found = find_files(str(folder))
    assert found.skipped == {
        "hidden folders": [".ipynb_checkpoints (1 file)"],
        "links to folders that are read already": ["loop"],
        "files about the data": ["LICENSE.txt"],
        "links to files that are read already": ["again.jsonl"],
    }
    assert {reason.split(" (")[0]: files for reason, files in found.doubtful.items()} == {
        "broken links": ["gone.jsonl"],
        "files of kinds that are not read": ["b.zip"],
        "text files beside files of rows": ["story.txt"],
    }
    assert names(fill(tmp_path / "books", "a.txt", "b.txt", "LICENSE.txt")) == {"": ["a.txt", "b.txt"]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], {"train": 1, "eval": 1, "test": 1}),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/dev-0.parquet"],
            {"train": 2, "eval": 1},
        ),
        (["train/a.jsonl", "train/b.jsonl", "testing/a.jsonl"], {"train": 2, "test": 1}),
        (["gsm.train.jsonl", "gsm.test.jsonl", "notes.jsonl"], {"train": 1, "test": 1}),
        (["one.jsonl", "two.jsonl", "my_eval.jsonl"], {"train": 2, "eval": 1}),
        (["a.jsonl", "train.jsonl", "latest.jsonl", "contest.jsonl"], {"": 4}),
        (["test_a.jsonl", "test_b.jsonl"], {"": 2}),
        (["train_test.jsonl", "train.jsonl"], {"": 2}),
    ],
)
def test_names_say_the_split(tmp_path: Path, files: list[str], expected: dict[str, int]) -> None:
    found = find_files(str(fill(tmp_path, *files)))
    assert {split: len(paths) for split, paths in found.files.items()} == expected
    assert sum(expected.values()) + sum(map(len, found.doubtful.values())) == len(files)


def test_split_words_stand_alone() -> None:
    assert [split_of(name) for name in ("Train.jsonl", "contest.csv", "a-validation_1.json", "dev-test.json")] == [
        "train",
        "",
        "eval",
        "",
    ]


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"did you mean train\.jsonl\?") as caught:
        find_files(str(tmp_path / "tain.jsonl"))
    assert str(tmp_path / "tain.jsonl") in str(caught.value)
    with pytest.raises(DataError, match="does not exist either"):
        find_files(str(tmp_path / "no" / "train.jsonl"))
    with pytest.raises(DataError, match="no such data file"):
        find_files(str(tmp_path / "*.csv"))
    fill(tmp_path / "empty", "README.md", ".a.jsonl")
    with pytest.raises(
        DataError, match=r"no data file in this folder \(hidden files: .a.jsonl; files about the data: README.md\)"
    ):
        find_files(str(tmp_path / "empty"))


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": f"p{n}", "completion": f"c{n}", "id": n} for n in range(5)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(2))}).save_to_disk(tmp_path / "both")
    assert names(tmp_path, "one") == {"": [f"one/data-0000{n}-of-00002.arrow" for n in (0, 1)]}
    assert {split: len(files) for split, files in names(tmp_path, "both").items()} == {"train": 1, "eval": 1}
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="lacks data-00001-of-00002"):
        find_files(str(tmp_path / "one"))
    odd = datasets.DatasetDict({"train": rows, "extra": rows})
    odd.save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match="a split 'extra'"):
        find_files(str(tmp_path / "odd"))


def sources(prepare: Any, **data: Any) -> tuple[dict[str, list[str]], list[str]]:
    """(names of files by split, messages)."""
    loaded = prepare.spec(**data)
    left_out = LeftOut(loaded.folder)
    found = find_sources(loaded, left_out)
    files = {name: [path.name for entry in entries for path in entry.files] for name, entries in found.items()}
    return files, [notice.message for notice in left_out.notices]


def test_files_of_a_folder_become_the_splits_unless_a_path_is_given(prepare: Any) -> None:
    fill(prepare.folder / "data", "train.jsonl", "validation.jsonl", "test.jsonl")
    fill(prepare.folder, "mine.jsonl")
    files, told = sources(prepare, train="data")
    assert files == {"train": ["train.jsonl"], "eval": ["validation.jsonl"], "test": ["test.jsonl"]}
    assert told == [
        "the files of data are its splits by their names: "
        "eval data/validation.jsonl; test data/test.jsonl; train data/train.jsonl"
    ]
    files, told = sources(prepare, train="data", eval="mine.jsonl")
    assert files == {"train": ["train.jsonl"], "eval": ["mine.jsonl"], "test": ["test.jsonl"]}
    assert any(
        message.startswith("data.eval names a path, so these are not read from data: data/validation.jsonl") for message in told
    )
    files, _ = sources(prepare, train="data/train.jsonl", eval="data", test="data")
    assert files == {"train": ["train.jsonl"], "eval": ["validation.jsonl"], "test": ["test.jsonl"]}
    _, told = sources(prepare, train="data", eval=0.3)
    assert any("data.eval: 0.3 is not used" in message for message in told)
    fill(prepare.folder / "half", "train.jsonl", "test.jsonl")
    with pytest.raises(DataError, match="by their names, the folder has files of test, train and none of eval"):
        sources(prepare, train="data", eval="half")


def test_what_is_held_out_is_not_trained_on_and_twice_is_once(prepare: Any) -> None:
    fill(prepare.folder / "data", "a.jsonl", "b.jsonl", "judge.jsonl")
    files, told = sources(prepare, train="data", eval="data/judge.jsonl")
    assert files == {"train": ["a.jsonl", "b.jsonl"], "eval": ["judge.jsonl"]}
    assert told == ["data/judge.jsonl is data.eval and is left out of train"]
    files, told = sources(prepare, train=[{"path": "data/a.jsonl"}, {"path": "data"}])
    assert files == {"train": ["a.jsonl", "b.jsonl", "judge.jsonl"]}
    assert told == ["data/a.jsonl is named twice under data.train and read once"]
    write(prepare.folder / "data" / "copy.jsonl", (prepare.folder / "data" / "a.jsonl").read_bytes())
    assert sources(prepare, train="data")[1] == ["files of equal content: data/a.jsonl (train), data/copy.jsonl (train)"]
    fill(prepare.folder / "globbed", "a.jsonl", "test.jsonl")
    assert sources(prepare, train="globbed/*.jsonl")[1] == [
        "data.train has files whose names say eval or test: globbed/test.jsonl"
    ]
    fill(prepare.folder / "only", "test.jsonl")
    assert sources(prepare, train="only")[1] == ["data.train has files whose names say eval or test: only/test.jsonl"]


def test_what_is_no_regular_file_is_told(prepare: Any) -> None:
    fill(prepare.folder / "data", "a.jsonl")
    os.mkfifo(prepare.folder / "data" / "b.jsonl")
    assert sources(prepare, train="data") == ({"train": ["a.jsonl"]}, ["not read in data: not regular files (1): b.jsonl"])
    with pytest.raises(DataError, match="is not a regular file"):
        sources(prepare, train="data/b.jsonl")
