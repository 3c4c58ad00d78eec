"""Folders that `datasets.save_to_disk` wrote: Arrow streams, with JSON files that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import DataError

SAVED_SPLITS = {
    "train": "train",
    "validation": "eval",
    "valid": "eval",
    "val": "eval",
    "dev": "eval",
    "eval": "eval",
    "test": "test",
}
"""Names of a DatasetDict's splits and ours."""


def find_saved(folder: Path) -> dict[str, list[Path]] | None:
    """Files by split (one Dataset: under an empty name) in the order of the dataset; None where `datasets` did not write it.

    Raises:
        DataError: a file that it names is missing or damaged, or a split has a name that says nothing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits: dict[str, list[Path]] = {}
        for name in _strings(_read(folder / "dataset_dict.json").get("splits")):
            split = SAVED_SPLITS.get(name, "")
            if not split:
                known = ", ".join(SAVED_SPLITS)
                raise DataError(
                    f"the saved DatasetDict has a split {name!r}",
                    where=str(folder),
                    expected=f"splits named {known}",
                    remedy=f"give the folders of its splits one by one, for example {folder / name}",
                )
            splits.setdefault(split, []).extend(_files_of(folder / name))
        return splits if len(splits) > 1 else {"": [path for files in splits.values() for path in files]}
    if (folder / "state.json").is_file() and "_data_files" in _read(folder / "state.json"):
        return {"": _files_of(folder)}
    return None


def _files_of(folder: Path) -> list[Path]:
    state = _read(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            "the saved dataset is a selection of rows, written by an old version of `datasets`",
            where=str(folder),
            remedy="call flatten_indices() and save it again",
        )
    entries = state.get("_data_files")
    names = [entry.get("filename") for entry in cast("list[Any]", entries) if isinstance(entry, dict)] if entries else []
    files = [folder / name for name in _strings(names)]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        what = f"the saved dataset lacks {', '.join(missing)}" if missing else "the saved dataset names no data file"
        raise DataError(what, where=str(folder), expected="what its state.json names", remedy="copy the whole folder again")
    return files


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), remedy="copy the folder again") from None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _strings(value: Any) -> list[str]:
    return [entry for entry in cast("list[Any]", value) if isinstance(entry, str)] if isinstance(value, list) else []
