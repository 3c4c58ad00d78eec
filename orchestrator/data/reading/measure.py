"""Estimate the amount of data and check its first rows, without reading all of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.reading.examples import Example, RowReader
from orchestrator.data.reading.formats import DataFile, count_rows, read_rows
from orchestrator.data.reading.formats.opening import DAMAGE, open_bytes
from orchestrator.data.reading.gather import Sources, bad_rows_error, find_sources, open_file, with_found_splits
from orchestrator.data.reading.row import BadRow
from orchestrator.data.splitting.labels import sort_classes
from orchestrator.errors import DataError
from orchestrator.plan import estimate_data_size
from orchestrator.plan.values import DataSize
from orchestrator.spec import LoadedSpec
from orchestrator.spec.models import JobSpec

FIRST_ROWS = 100
"""Number of rows of each file that are checked before a run."""
SAMPLE_BYTES = 8 << 20
"""Bytes read of a larger file to estimate the rest."""
CLASS_ROWS = 100_000
"""Number of rows from which the classes are collected."""
ROW_FORMATS = ("JSON Lines", "CSV")


@dataclass(frozen=True)
class _Size:
    num_bytes: int = 0
    num_rows: int = 0

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.num_bytes + other.num_bytes, self.num_rows + other.num_rows)


class Measured(NamedTuple):
    """Size of the data before tokenization."""

    size: DataSize
    labels: Counter[str] | None
    """Rows of each class among the first CLASS_ROWS of train; None unless classified."""


def measure_data(loaded: LoadedSpec) -> Measured:
    """Return rows, bytes and, for `classify`, classes of the files that the spec names; nothing is tokenized.

    Raises:
        DataError: a path matches no file, or the first rows of one cannot be used.
    """
    sources = find_sources(loaded)
    check_first_rows(loaded, sources)
    spec = with_found_splits(loaded.spec, sources)
    sizes = {name: _size_of(spec, name, sources) for name in sources}
    labels = _count_classes(spec, sources) if spec.traits.has_labels else None
    classes = sort_classes(labels) if labels is not None else []
    estimate = estimate_data_size(
        sizes["train"].num_bytes,
        sizes["train"].num_rows,
        spec,
        eval_bytes=sizes["eval"].num_bytes if "eval" in sizes else None,
        retain_bytes=sizes["retain"].num_bytes if "retain" in sizes else 0,
        num_classes=len(classes),
    )
    return Measured(estimate.model_copy(update={"class_names": tuple(classes)}), labels)


def check_first_rows(loaded: LoadedSpec, sources: Sources | None = None) -> None:
    """Check the first rows of every file, so that wrong columns are found before planning.

    Raises:
        DataError: some cannot be used; with `data.skip_bad_rows`, none of a file's rows can.

    """
    bad: list[BadRow] = []
    for name, path in _paths(sources if sources is not None else find_sources(loaded)):
        rows = list(_first(loaded.spec, name, path))
        wrong = [row for row in rows if isinstance(row, BadRow)]
        if not loaded.spec.data.skip_bad_rows or len(wrong) == len(rows):
            bad += wrong
    if bad:
        raise bad_rows_error(bad)


def _paths(sources: Sources) -> Iterator[tuple[str, Path]]:
    return ((name, path) for name, entries in sources.items() for entry in entries for path in entry.files)


def _first(spec: JobSpec, split: str, path: Path) -> Iterator[Example | BadRow]:
    reader = RowReader(spec, split)
    file = open_file(path, reader)
    rows = read_rows(file, reader.choose_columns, text_documents=spec.data.text_documents)
    for row in itertools.islice(rows, FIRST_ROWS):
        yield row if isinstance(row, BadRow) else reader.read(row)


def _size_of(spec: JobSpec, split: str, sources: Sources) -> _Size:
    total = _Size()
    reader = RowReader(spec, split)
    for entry in sources[split]:
        for path in entry.files:
            total += _measure(spec, split, open_file(path, reader))
    return total


def _measure(spec: JobSpec, split: str, file: DataFile) -> _Size:
    """Return the bytes of the file if it is not compressed; otherwise of its rows' text, estimated from the first ones.

    Raises:
        DataError: the file is damaged.
    """
    if file.kind in (*ROW_FORMATS, "JSON", "text"):
        return _measure_text(spec, split, file)
    try:
        rows = count_rows(file)
    except (OSError, ValueError) as error:
        raise DataError(f"damaged {file.kind}: {error}", where=str(file.path), remedy="fix or replace the file") from None
    return _Size(round(rows * _row_bytes(spec, split, file)), rows)


def _measure_text(spec: JobSpec, split: str, file: DataFile) -> _Size:
    size = file.path.stat().st_size
    try:
        with open_bytes(file.path, file.compression) as stream:
            sample = stream.read(SAMPLE_BYTES)
            is_whole = not stream.read(1)
    except DAMAGE as error:
        raise DataError(f"damaged or cut short: {error}", where=str(file.path), remedy="fix or replace the file") from None
    if is_whole:
        num_bytes = len(sample)
    else:
        num_bytes = size * _ratio(file, len(sample)) if file.compression else size
    share = num_bytes / max(1, len(sample))
    if file.kind in ROW_FORMATS:
        rows = share * sample.count(b"\n") - (file.kind == "CSV")
        if is_whole and not sample.endswith(b"\n"):
            rows += 1
    elif file.kind == "text":
        rows = 1 if spec.data.text_documents == "file" else share * sample.count(b"\n")
    else:
        rows = num_bytes / max(1.0, _row_bytes(spec, split, file, overhead=1.2))
    return _Size(round(num_bytes), max(1, round(rows)))


def _ratio(file: DataFile, num_sample_bytes: int) -> float:
    """Return uncompressed bytes per compressed byte at the beginning of the file."""
    import zlib

    if file.compression != "gzip":
        return 4.0
    unpacked = zlib.decompressobj(31)
    with file.path.open("rb") as stream:
        given = taken = 0
        while given < num_sample_bytes and (piece := stream.read(1 << 16)):
            given += len(unpacked.decompress(piece))
            taken += len(piece)
            if unpacked.eof:
                break
    return given / max(1, taken)


def _row_bytes(spec: JobSpec, split: str, file: DataFile, *, overhead: float = 1.0) -> float:
    """Return the mean bytes read per row, over the first rows."""
    examples = [row for row in _first(spec, split, file.path) if isinstance(row, Example)]
    return overhead * sum(map(_text_bytes, examples)) / max(1, len(examples))


def _text_bytes(example: Example) -> int:
    parts = (example.text, example.prompt, example.completion, example.label)
    turns = sum(len(str(turn).encode("utf-8", "replace")) for turn in example.messages or ())
    return turns + sum(len(part.encode()) for part in parts if part)


def _count_classes(spec: JobSpec, sources: Sources) -> Counter[str]:
    """Count the rows of each class among the first CLASS_ROWS of train. Rows that cannot be read are ignored here."""
    reader = RowReader(spec, "train")
    rows = (
        reader.read(row)
        for name, path in _paths(sources)
        if name == "train"
        for row in read_rows(open_file(path, reader), reader.choose_columns)
        if not isinstance(row, BadRow)
    )
    return Counter(str(row.label) for row in itertools.islice(rows, CLASS_ROWS) if isinstance(row, Example))
