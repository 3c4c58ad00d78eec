"""Read the examples of every split with files: find the files, read the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.data.reading.examples import Example, RowReader
from orchestrator.data.reading.files import Found, find_files
from orchestrator.data.reading.formats import DataFile, read_rows, sniff
from orchestrator.data.reading.notices import SplitReading, note_files, note_reading
from orchestrator.data.reading.row import BadRow
from orchestrator.data.summary import LeftOut, listed
from orchestrator.errors import DataError
from orchestrator.spec import LoadedSpec
from orchestrator.spec.models import DataSpec, JobSpec
from orchestrator.units import printable

SPLITS = ("train", "eval", "test", "retain")
PLACES = 3
"""Number of places named for each reason for which rows cannot be used."""


@dataclass(frozen=True)
class Source:
    """Path in the spec, with its split and weight."""

    path: str
    weight: float
    files: tuple[Path, ...]


Sources = dict[str, list[Source]]
"""Sources by split; a split that is a share of train has none."""


def find_sources(loaded: LoadedSpec, left_out: LeftOut | None = None) -> Sources:
    """Find every file that the spec's data section names.

    A folder given as `data.train` may hold files of eval and test too, told by their names (`files.SPLIT_WORDS`): they are
    these splits, unless `data.eval` or `data.test` names a path.

    Args:
        left_out: Gets a notice of what is found and not read.

    Raises:
        DataError: paths without a file, all of them.
    """
    data = loaded.spec.data
    found: list[tuple[str, float, Found]] = []
    missing: list[tuple[str, DataError]] = []
    for name, key, path, weight in _named_paths(data):
        try:
            found.append((name, weight, _own_part(name, find_files(loaded.resolve(path)))))
        except DataError as error:
            missing.append((loaded.where(key), error))
    _raise_missing(missing)
    notes = left_out or LeftOut(loaded.folder)
    _drop_held_out(found, notes)
    _drop_repeated(found, notes)
    sources: Sources = {}
    for origin in dict.fromkeys(entry.origin for _, _, entry in found if entry.origin):
        notes.info(origin)
    for name, weight, entry in found:
        for split, files in entry.files.items():
            target = split or name
            if target != name and isinstance(getattr(data, target), str):
                notes.info(
                    f"data.{target} names a path, so these are not read from {notes.relative(entry.path)}: "
                    + ", ".join(notes.relative(str(path)) for path in files)
                )
            else:
                own_weight = weight if target == "train" else 1.0
                sources.setdefault(target, []).append(Source(entry.path, own_weight, tuple(files)))
    note_files(data, [(name, entry) for name, _, entry in found], notes)
    return {name: sources[name] for name in SPLITS if name in sources}


def with_found_splits(spec: JobSpec, sources: Sources) -> JobSpec:
    """Replace a split's share in the spec by a path if a folder contains files of that split."""
    own = {name: sources[name][0].path for name in ("eval", "test") if name in sources}
    shares = {name: path for name, path in own.items() if not isinstance(getattr(spec.data, name), str)}
    return spec.model_copy(update={"data": spec.data.model_copy(update=shares)}) if shares else spec


def _named_paths(data: DataSpec) -> list[tuple[str, str, str, float]]:
    """Yield (split, key in the spec, path, weight) of every path in the data section."""
    if isinstance(data.train, str):
        named = [("train", "data.train", data.train, 1.0)]
    else:
        named = [
            ("train", f"data.train[{index}].path", source.path, source.weight or 1.0) for index, source in enumerate(data.train)
        ]
    others = (("eval", data.eval), ("test", data.test), ("retain", data.retain))
    return named + [(name, f"data.{name}", path, 1.0) for name, path in others if isinstance(path, str)]


def _raise_missing(missing: list[tuple[str, DataError]]) -> None:
    if len(missing) == 1:
        where, error = missing[0]
        raise DataError(f"{error.where}: {error.what}", where=where, expected=error.expected, remedy=error.remedy)
    if missing:
        lines = listed(f"{where}: {error.where}: {error.what}. {error.remedy}" for where, error in missing)
        raise DataError(f"{len(missing)} data paths without a file:\n  {lines}", remedy="fix the paths under `data`")


def _own_part(name: str, found: Found) -> Found:
    """Return the files of the split that the spec names a folder for, if the folder has files of several splits.

    Raises:
        DataError: it has none.

    """
    if not found.has_splits:
        return found
    if name == "retain":
        return replace(found, files={"": found.all_files()})
    if name not in found.files:
        others = ", ".join(sorted(found.files))
        raise DataError(
            f"by their names, the folder has files of {others} and none of {name}",
            where=found.path,
            expected=f"a file whose name contains {name}",
            remedy="give the file itself",
        )
    return found if name == "train" else replace(found, files={"": found.files[name]})


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _drop_held_out(found: list[tuple[str, float, Found]], notes: LeftOut) -> None:
    """Drop files of other splits from a folder or glob of train."""
    held_out = {_identity(path): name for name, _, entry in found if name != "train" for path in entry.all_files()}
    for name, _, entry in found:
        if name == "train" and (entry.is_folder or entry.is_glob):
            for split, files in entry.files.items():
                taken = [path for path in files if split in ("", "train") and _identity(path) in held_out]
                if taken and len(taken) < len(files):
                    entry.files[split] = [path for path in files if path not in taken]
                    for path in taken:
                        other = held_out[_identity(path)]
                        notes.info(f"{notes.relative(str(path))} is data.{other} and is left out of train")


def _drop_repeated(found: list[tuple[str, float, Found]], notes: LeftOut) -> None:
    """Drop repeated files: one that several sources of train name is read once."""
    seen: dict[tuple[int, int], float] = {}
    for name, weight, entry in found:
        if name != "train":
            continue
        for split, files in list(entry.files.items()):
            kept: list[Path] = []
            for path in files:
                identity = _identity(path)
                if identity in seen:
                    remedy = f"list it once with a larger weight, for example weight: {seen[identity] + weight:g}"
                    notes.warn(f"{notes.relative(str(path))} is named twice under data.train and read once", remedy)
                else:
                    seen[identity] = weight
                    kept.append(path)
            entry.files[split] = kept
        entry.files = {split: files for split, files in entry.files.items() if files}


def read_examples(spec: JobSpec, sources: Sources, left_out: LeftOut) -> dict[str, list[Example]]:
    """Read the examples of every split with files; malformed rows stop the run together, or are counted with `skip_bad_rows`.

    Damage after which the rest of a file cannot be read always stops the run.

    Raises:
        DataError: rows that cannot be used, or a split without one that can.
    """
    found: dict[str, list[Example]] = {}
    bad: list[BadRow] = []
    for name, entries in sources.items():
        reading = SplitReading(name, RowReader(spec, name))
        examples = found[name] = []
        for example in _read(reading, entries):
            if isinstance(example, Example):
                examples.append(example)
            else:
                bad.append(example)
                left_out.add(name, f"malformed: {example.reason}", example.place)
        reading.num_examples = len(examples)
        note_reading(reading, left_out)
    fatal = [row for row in bad if row.ends_file]
    if bad and (fatal or not spec.data.skip_bad_rows):
        raise bad_rows_error(fatal if spec.data.skip_bad_rows else bad)
    for name, examples in found.items():
        if not examples:
            raise _no_row(spec, name, sources[name], bad)
    _check_documents(spec, found)
    return found


def _read(reading: SplitReading, entries: Iterable[Source]) -> Iterator[Example | BadRow]:
    reader = reading.rows
    for number, source in enumerate(entries):
        for path in source.files:
            file = open_file(path, reader)
            reading.files.append(file)
            for row in read_rows(file, reader.choose_columns, text_documents=reader.spec.data.text_documents):
                yield row if isinstance(row, BadRow) else reader.read(row, source=number, weight=source.weight)


def open_file(path: Path, reader: RowReader) -> DataFile:
    """Detect a file's format, given the columns that the reader expects."""
    return sniff(path, columns=reader.expected_columns, delimiter=reader.spec.data.delimiter)


def _no_row(spec: JobSpec, name: str, sources: list[Source], bad: list[BadRow]) -> DataError:
    where = ", ".join(source.path for source in sources)
    files = {str(path) for source in sources for path in source.files}
    reasons = bad_rows_text([row for row in bad if row.file in files])
    return DataError(f"no row of {name} can be used:\n  {reasons}", where=where, expected="at least one", remedy="fix the file")


def _check_documents(spec: JobSpec, found: dict[str, list[Example]]) -> None:
    """Check that text files give enough documents for the splits that are taken from them.

    Raises:
        DataError: they do not, and lines or paragraphs would.

    """
    shares = sum(name not in found and isinstance(getattr(spec.data, name), float) for name in ("eval", "test"))
    train = found["train"]
    if not spec.traits.cuts_into_chunks or not shares or len(train) > shares or spec.data.text_documents != "file":
        return
    lines = {example.file: (example.text or "").count("\n") + 1 for example in train if _is_text_file(example)}
    if len(lines) == len(train):
        path, count = max(lines.items(), key=lambda item: item[1])
        num = f"{len(train)} document{'s' if len(train) > 1 else ''}"
        raise DataError(
            f"a text file is one document, so train has {num} ({path} has {count} lines), and eval and test are taken from train",
            expected=f"at least {shares + 1} documents, or paths for data.eval and data.test",
            remedy="set data.text_documents: line (or paragraph) if each line is a document of its own; otherwise give one file "
            'a document in a folder, or JSON Lines with {"text": ...} a row',
        )


def _is_text_file(example: Example) -> bool:
    return example.line == 1 and Path(example.file).suffix.lower() not in (".jsonl", ".json", ".csv", ".parquet", ".arrow")


def bad_rows_error(bad: list[BadRow]) -> DataError:
    """Return one error for all bad rows, with one line per reason."""
    count = len(bad)
    if any(row.ends_file for row in bad):
        remedy = (
            "fix the file, or name its columns in data.columns if they are others; "
            "data.skip_bad_rows does not skip a file that cannot be read to its end"
        )
    else:
        remedy = "fix them, or set data.skip_bad_rows: true to drop them (they are counted and listed)"
    return DataError(f"{count} row{'s' if count != 1 else ''} cannot be used:\n  {bad_rows_text(bad)}", remedy=remedy)


def bad_rows_text(bad: Iterable[BadRow]) -> str:
    """Return one line for each reason: how many rows, why, and the first places."""
    reasons: dict[str, list[BadRow]] = {}
    for row in bad:
        reasons.setdefault(row.reason, []).append(row)
    lines: list[str] = []
    for reason, rows in sorted(reasons.items(), key=lambda item: -len(item[1])):
        places = ", ".join(_place(row, rows[index - 1] if index else None) for index, row in enumerate(rows[:PLACES]))
        more = f" and {len(rows) - PLACES} more" if len(rows) > PLACES else ""
        lines.append(f"{len(rows)} row{'s' if len(rows) != 1 else ''}: {reason}: {places}{more}")
    return listed(lines)


def _place(row: BadRow, before: BadRow | None) -> str:
    """Return `train.jsonl:3 (what was found)` for the first place, `:5` for those that follow in the same file."""
    place = printable(row.place)
    if before is None:
        return f"{place} ({row.detail})" if row.detail else place
    return place.removeprefix(printable(row.file)) if row.file == before.file else place
