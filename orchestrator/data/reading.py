"""Reading rows: JSONL, CSV, Parquet and text files, with the place of every row.

A row that cannot be read is a `BadRow` with its file and line, never an exception in the middle: the caller
decides whether it stops the run, and all of them are told at once.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError

csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class Row:
    """One row of a file. `line` counts from 1; in Parquet it is the row's number, from 1."""

    values: dict[str, Any]
    file: str
    line: int
    is_document: bool = False
    """Whether the row is a whole text file, which has no columns to rename."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    line: int
    reason: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def find_files(pattern: str) -> list[Path]:
    """The files of a path, a folder or a glob, sorted.

    Raises:
        DataError: nothing there; names what lies near.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        names = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        found = sorted(file for file in names if file.suffix.lower() in READERS)
    else:
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - pathlib takes no absolute patterns
        found = sorted(path for path in map(Path, matches) if path.is_file())
    if not found:
        if path.is_dir():
            kinds = ", ".join(READERS)
            raise DataError("no data file in this folder", where=pattern, expected=kinds, remedy="name another, or fill it")
        raise DataError("no such data file", where=pattern, expected="a file, a glob or a folder", remedy=_near(path))
    return found


def read_rows(pattern: str) -> Iterator[Row | BadRow]:
    """Every row of every file of `pattern`, in order. A file without rows is a `BadRow` too.

    Raises:
        DataError: no file, a file that cannot be opened, or one of an unknown kind.
    """
    for path in find_files(pattern):
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"files of kind {path.suffix or '(none)'} are not read",
                where=str(path),
                expected=", ".join(sorted(READERS)),
                remedy="convert the file, or rename it if it is one of these",
            )
        empty = True
        try:
            for row in reader(path):
                empty = False
                yield row
        except OSError as error:
            raise DataError(f"cannot be read: {error}", where=str(path), remedy="mend or replace the file") from None
        if empty:
            yield BadRow(str(path), 1, "the file holds no row")


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    for line, text in _lines(path):
        if isinstance(text, BadRow):
            yield text
            continue
        if not text.strip():
            continue
        try:
            values = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            yield BadRow(str(path), line, f"malformed JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(values, str(path), line)
        else:
            yield BadRow(str(path), line, f"a JSON {type(values).__name__}, expected an object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that has a key twice would lose a value without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the key {', '.join(map(repr, twice))} stands there more than once")
    return values


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    """A row's line is the one it begins on: a quoted field may run over several."""
    with path.open("rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield _not_utf8(path, content, error)
        return
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(str(path), line, f"malformed CSV: {error}")
            if header is None:
                return
            continue
        if header is None:
            header = fields
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                yield BadRow(str(path), line, f"the header names {', '.join(map(repr, twice))} more than once")
                return
        elif len(fields) == len(header):
            yield Row(dict(zip(header, fields, strict=True)), str(path), line)
        elif fields:
            yield BadRow(str(path), line, f"{len(fields)} fields, the header has {len(header)} ({', '.join(header)})")


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow.parquet as parquet

    line = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                line += 1
                yield Row(values, str(path), line)
    except (OSError, ValueError) as error:
        yield BadRow(str(path), line + 1, f"damaged Parquet: {error}")


def _read_text(path: Path) -> Iterator[Row | BadRow]:
    """A text file is one document."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield _not_utf8(path, content, error)
        return
    if text.strip():
        yield Row({"text": text}, str(path), 1, is_document=True)


READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""By suffix; a new kind of file is a row here."""


def _lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """Lines as text, split at line feeds alone: JSON strings may hold U+2028."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, BadRow(str(path), number, f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")


def _not_utf8(path: Path, content: bytes, error: UnicodeDecodeError) -> BadRow:
    line = content.count(b"\n", 0, error.start) + 1
    return BadRow(str(path), line, f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}")


def _near(path: Path) -> str:
    """What to do about a missing path."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either; paths are relative to the spec's file"
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the folder holds {', '.join(sorted(names)[:5]) or 'nothing'}."
    return f"{hint} Paths are relative to the spec's file"
