"""Find data files: the files of a path, a folder or a glob, their splits, and what is ignored."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from orchestrator.data.reading.formats import READ, SUFFIXES, data_suffix, read_rows, sniff
from orchestrator.data.reading.formats.sniff import TEXT_SUFFIXES
from orchestrator.data.reading.hub_data import find_hub_data
from orchestrator.data.reading.row import BadRow, Row
from orchestrator.errors import DataError
from orchestrator.spec.hub_ids import HUB
from orchestrator.units import printable

SPLIT_WORDS = {
    "train": ("train", "training"),
    "eval": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Split named by a word of a file's or folder's name: `train-00000-of-00001.parquet`, `dev.jsonl`."""
WORD = re.compile(r"[a-z]+")
HIDDEN_FOLDERS = ("__pycache__", "__MACOSX")
BACKUP = re.compile(r"(~|\.(bak|swp|swo|orig|old|tmp|temp|part|partial|crdownload|lock)|#)$", re.IGNORECASE)
ABOUT = re.compile(
    r"^(readme|licen[cs]e|copying|notice|authors|contributors|changelog|requirements([-_.].*)?|citation|robots|todo)(\.(txt|md|text))?$",
    re.IGNORECASE,
)
"""Names of text files that accompany data and contain none."""
SETTINGS = re.compile(
    r"^(dataset_infos?|dataset_dict|state|config|metadata|package(-lock)?|tokenizer(_config)?|special_tokens_map|"
    r"generation_config|manifest|croissant|schema|\.?vscode)\.json$",
    re.IGNORECASE,
)
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".xlsx", ".xls", ".ods", ".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite")
"""Suffixes of files that may hold data and are not read."""


@dataclass
class Found:
    """Files at one path of the spec."""

    path: str
    files: dict[str, list[Path]] = field(default_factory=dict)
    """Files by split; all of them under an empty name if no name contains a split."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Names of ignored files, relative to the folder, by reason."""
    doubtful: dict[str, list[str]] = field(default_factory=dict)
    """Names of ignored files that probably hold data, by reason."""
    is_folder: bool = False
    is_glob: bool = False
    origin: str = ""
    """Sentence about the commit of a data set of the hub."""

    def all_files(self) -> list[Path]:
        return sorted(path for paths in self.files.values() for path in paths)

    @property
    def has_splits(self) -> bool:
        return "" not in self.files and len(self.files) > 1

    def skip(self, reason: str, path: Path | str, *, doubtful: bool = False) -> None:
        entries = self.doubtful if doubtful else self.skipped
        shown = os.path.relpath(path, self.path) if self.is_folder else str(path)
        entries.setdefault(reason, []).append(printable(shown))


def find_files(pattern: str) -> Found:
    """Return the files of a path, a folder (recursively), a glob, sorted by path, or of a data set of the hub.

    Raises:
        DataError: nothing there; names what lies near.
    """
    path = Path(pattern)
    found = Found(pattern)
    if pattern.startswith(HUB):
        splits, found.origin = find_hub_data(pattern)
        found.is_folder, found.files = True, _known_splits(splits, pattern)
    elif path.is_file():
        found.files[""] = [path]
    elif path.is_dir():
        found.is_folder = True
        _search_folder(path, found)
    else:
        found.is_glob = True
        _search_glob(pattern, found)
    if not found.files:
        raise _nothing(path, found)
    return found


def _nothing(path: Path, found: Found) -> DataError:
    if not found.is_folder:
        if path.exists():
            raise DataError(
                "is not a regular file", where=found.path, expected="a file, a glob or a folder", remedy="give another path"
            )
        what = "is a broken link" if path.is_symlink() else "no such data file"
        return DataError(what, where=found.path, expected="a file, a glob or a folder", remedy=_near(path))
    aside = "; ".join(f"{reason}: {shown(names)}" for reason, names in (found.skipped | found.doubtful).items())
    what = f"no data file in this folder ({aside})" if aside else "no data file in this folder"
    return DataError(what, where=found.path, expected=READ, remedy="give another path, or put the data there")


def _search_glob(pattern: str, found: Found) -> None:
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - pathlib takes no absolute patterns
    files: list[Path] = []
    for path in matches:
        if path.is_symlink() and not path.exists():
            found.skip("broken links", path, doubtful=True)
        elif path.is_file() and BACKUP.search(path.name):
            found.skip("backup and temporary files", path)
        elif path.is_file():
            files.append(path)
        elif path.is_dir() and not pattern.rstrip("/").endswith("**"):
            found.skip("folders that the glob matches (only files are read)", path)
    if files:
        found.files[""] = _once(files, found)


def _search_folder(folder: Path, found: Found) -> None:
    saved = find_saved(folder)
    if saved is not None:
        found.files = saved
        return
    rows: list[Path] = []
    texts: list[Path] = []
    for path in _walk(folder, found):
        suffix = data_suffix(path.name)
        if BACKUP.search(path.name):
            found.skip("backup and temporary files", path)
        elif ABOUT.match(path.name):
            found.skip("files about the data", path)
        elif SETTINGS.match(path.name):
            found.skip("settings files", path)
        elif suffix in SUFFIXES:
            (texts if suffix in TEXT_SUFFIXES else rows).append(path)
        elif path.suffix.lower() in ARCHIVES or suffix in ARCHIVES:
            found.skip("files of kinds that are not read", path, doubtful=True)
        else:
            found.skip("files of other kinds", path)
    if rows:
        for path in texts:
            found.skip("text files beside files of rows (give them as a separate source)", path, doubtful=True)
    files = _once(sorted(rows or texts), found)
    if files:
        found.files = _by_split(folder, files, found)


def _walk(folder: Path, found: Found) -> Iterator[Path]:
    """Yield files below the folder; hidden ones and broken links are noted, a folder reached by two links is searched once."""
    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = Path(here)
        # By inode: followed links may form a cycle.
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            found.skip("links to folders that are read already", place)
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in sorted(folders):
            if name.startswith(".") or name in HIDDEN_FOLDERS:
                folders.remove(name)
                count = sum(len(files) for _, _, files in os.walk(place / name))
                found.skip("hidden folders", f"{place / name}{f' ({count} files)' if count != 1 else ' (1 file)'}")
        folders.sort()
        for name in sorted(names):
            path = place / name
            if name.startswith("."):
                found.skip("hidden files", path)
            elif path.is_symlink() and not path.exists():
                found.skip("broken links", path, doubtful=True)
            elif path.is_file():
                yield path
            else:
                found.skip("not regular files", path)


def _once(files: list[Path], found: Found) -> list[Path]:
    """Return each file once, by its inode: links to a file that is already read are noted."""
    seen: set[tuple[int, int]] = set()
    kept: list[Path] = []
    # Real files first, so that a link is what is reported as the duplicate.
    for path in sorted(files, key=lambda path: (path.is_symlink(), path)):
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            found.skip("links to files that are read already", path)
        else:
            seen.add((status.st_dev, status.st_ino))
            kept.append(path)
    return sorted(kept)


def _by_split(folder: Path, files: list[Path], found: Found) -> dict[str, list[Path]]:
    """Group files by the split in their names, or else in their folders' names.

    Where some are of eval or test, the others are train if no name says train; if one does, the others belong to nothing and
    are left out. If no name mentions eval or test, all files are under an empty name.
    """
    splits: dict[str, list[Path]] = {}
    for path in files:
        parts = path.relative_to(folder).parts
        # The file's own name decides before its folders'.
        said = next((split for part in reversed(parts) if (split := split_of(part))), "")
        splits.setdefault(said, []).append(path)
    # Names that do not distinguish two splits decide nothing: all files belong to the split that the spec names them for.
    if not splits.keys() & {"eval", "test"} or splits.keys() <= {"eval"} or splits.keys() <= {"test"}:
        return {"": files}
    others = splits.pop("", [])
    if "train" not in splits and others:
        splits["train"] = others
    else:
        for path in others:
            found.skip("files without a split in their names, beside files with one", path, doubtful=True)
    return splits


def split_of(name: str) -> str:
    """Return the split that a file's or folder's name contains; empty if none or several."""
    words = set(WORD.findall(name.lower()))
    said = [split for split, known in SPLIT_WORDS.items() if words & set(known)]
    return said[0] if len(said) == 1 else ""


def shown(names: list[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _near(path: Path) -> str:
    """Return what to do about a missing path."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either; paths are relative to the spec's file"
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    # Most missing paths are typing errors.
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the folder holds {', '.join(sorted(names)[:5]) or 'nothing'}."
    return f"{printable(hint)} Paths are relative to the spec's file"


def read_path(pattern: str) -> Iterator[Row | BadRow]:
    """Yield every row of every file of a path, a folder or a glob, with all of its columns.

    Raises:
        DataError: no file, or one of a kind that is not read.
    """
    for path in find_files(pattern).all_files():
        yield from read_rows(sniff(path))


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
    """Return the files of a folder written by `datasets.save_to_disk`, by split (one Dataset: under an empty name), in the
    dataset's order; None if it is not one.

    Raises:
        DataError: a file that it names is missing or damaged, or a split has a name that says nothing.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _strings(_read(folder / "dataset_dict.json").get("splits"))
        return _known_splits({name: _files_of(folder / name) for name in names}, str(folder))
    if (folder / "state.json").is_file() and "_data_files" in _read(folder / "state.json"):
        return {"": _files_of(folder)}
    return None


def _known_splits(files: dict[str, list[Path]], where: str) -> dict[str, list[Path]]:
    """Return the files of a data set by our names of its splits; of a single split under an empty name.

    Raises:
        DataError: one of several splits has a name that says nothing.
    """
    splits: dict[str, list[Path]] = {}
    for name, paths in files.items():
        split = SAVED_SPLITS.get(name, "")
        if not split and len(files) > 1:
            example = (
                f"{where}{'/' if where.count(':') > 1 else ':/'}{name}" if where.startswith(HUB) else str(Path(where) / name)
            )
            raise DataError(
                f"the data set has a split {name!r}",
                where=where,
                expected=f"splits named {', '.join(SAVED_SPLITS)}",
                remedy=f"give its splits one by one, for example {example}",
            )
        splits.setdefault(split, []).extend(paths)
    # A single split is simply the data, whatever its name.
    return splits if len(splits) > 1 else {"": [path for paths in splits.values() for path in paths]}


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
