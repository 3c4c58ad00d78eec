"""Detect the format of a data file from its first bytes; the name decides only if the content does not."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.data.reading.formats.delimiters import DELIMITER_NAMES, Dialect, sniff_dialect
from orchestrator.data.reading.formats.opening import COMPRESSION_SUFFIXES, DAMAGE, compression_of, encoding_of, open_bytes
from orchestrator.errors import DataError
from orchestrator.units import printable

Kind = Literal["JSON Lines", "JSON", "CSV", "Parquet", "Arrow", "Arrow stream", "Feather V1", "text"]
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonlines")
CSV_SUFFIXES = (".csv", ".tsv", ".tab", ".psv")
TEXT_SUFFIXES = (".txt", ".text", ".md")
COLUMN_SUFFIXES = (".parquet", ".pq", ".arrow", ".feather", ".ipc")
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, *COLUMN_SUFFIXES, ".txt", ".text")
"""Suffixes of files that are read in a folder; others are read if they are named and their content shows the format."""
READ = "JSON Lines, JSON, CSV and text (each also as .gz, .zst, .bz2 or .xz), Parquet, Arrow and Feather"
HEAD_BYTES = 1 << 16
MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"FEA1", "Feather V1"),
    (b"\xff\xff\xff\xff", "Arrow stream"),
)
REFUSED = (
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or export the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet or document", "export it as CSV"),
    (b"%PDF", "a PDF", "extract its text"),
    (b"SQLite format 3", "a SQLite database", "export the table as CSV"),
    (b"\x89HDF", "an HDF5 file", "write it as Parquet"),
    (b"\x93NUMPY", "a NumPy array", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"ORC", "an ORC file", "write it as Parquet"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    *(
        (bytes((0x80, version)), "a pickle, which could run code", "write it as JSON Lines or Parquet")
        for version in (2, 3, 4, 5)
    ),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "fetch the data with `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page", "download the file itself"),
    (b"<html", "an HTML page", "download the file itself"),
)
"""(first bytes, format, what to do) of formats that users have and that are not read."""
WRAPPERS = ("data", "rows", "examples", "instances", "records", "items", "train")
"""Keys under which a JSON object holds the list of rows."""
KEY = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*:\s*')
LIST_OF_ROWS = re.compile(r"\[\s*[{\]]")
COMMA = re.compile(r"\s*,")
MANY_NULS = 0.2
"""Share of NUL bytes that indicates UTF-16 (half of western text); a damaged text file has fewer."""


@dataclass(frozen=True)
class DataFile:
    """File with its format."""

    path: Path
    kind: Kind
    compression: str = ""
    encoding: str = "utf-8"
    dialect: Dialect = field(default_factory=Dialect)
    """Dialect of CSV."""
    shape: str = ""
    """Kind of JSON."""

    @property
    def label(self) -> str:
        """Display name: `gzip JSON Lines`, `CSV with semicolons`."""
        kind = self.shape or self.kind
        if self.kind == "CSV":
            kind = f"CSV with {DELIMITER_NAMES.get(self.dialect.delimiter, repr(self.dialect.delimiter))}"
        encoding = f" in {self.encoding.upper()}" if self.encoding in ("utf-16", "utf-32") else ""
        return f"{self.compression} {kind}{encoding}".strip()


def data_suffix(name: str) -> str:
    """Return the suffix of the format, without that of a compression: `a.jsonl.gz` -> `.jsonl`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix


def sniff(path: Path, *, columns: Collection[str] = (), delimiter: str | None = None) -> DataFile:
    """Detect the format of a file.

    Args:
        columns: Names that a CSV's header is expected to have: they decide between delimiters.
        delimiter: The one of `data.delimiter`, where it is given.

    Raises:
        DataError: it cannot be opened, or is of a kind that is not read.
    """
    compression, head, is_whole = _head(path)
    suffix = data_suffix(path.name)
    # A text may begin with any of these characters.
    if head and suffix not in TEXT_SUFFIXES:
        _refuse(path, head)
    kind: Kind | None = next((kind for magic, kind in MAGIC if head.startswith(magic)), None)
    if kind is None and head[257:262] == b"ustar":
        raise _unread(path, "a tar archive", "unpack it and give the folder")
    if kind is not None:
        if compression:
            raise _unread(path, f"{kind} inside {compression}", "decompress it: the format compresses itself")
        return DataFile(path, kind)
    if compression and compression_of(head):
        raise _unread(path, f"{compression_of(head)} inside {compression}", "decompress it once")
    encoding = encoding_of(head)
    if encoding == "utf-8" and suffix not in COLUMN_SUFFIXES and _is_binary(head[:4096]):
        raise _unread(path, "binary, or UTF-16 without a byte order mark", "save it as UTF-8")
    text = head.decode(encoding, "replace")
    kind = _kind_of_text(text, is_whole, suffix)
    # A CSV under a JSON name: reported as CSV, rather than a JSON error on every line.
    if kind == "JSON Lines" and suffix in JSON_SUFFIXES and _is_table(text, columns, is_whole=is_whole):
        kind = "CSV"
    if kind is None:
        raise _unread(
            path, f"of a kind that is not recognized ({suffix or 'no suffix'})", "convert it, or rename it if it is CSV or text"
        )
    dialect = sniff_dialect(text, suffix, columns, delimiter, is_whole=is_whole) if kind == "CSV" else Dialect()
    return DataFile(path, kind, compression, encoding, dialect, _shape(text) if kind == "JSON" else "")


def _head(path: Path) -> tuple[str, bytes, bool]:
    """Return (compression, the first uncompressed bytes, whether these are all)."""
    try:
        with path.open("rb") as file:
            compression = compression_of(file.read(8))
        with open_bytes(path, compression) as file:
            return compression, *_first_bytes(file.read)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", where=str(path), remedy="fix or replace the file") from None


def _first_bytes(read: object) -> tuple[bytes, bool]:
    """Return what can be read of the first HEAD_BYTES: the reader reports a truncated compressed file with the place."""
    head = b""
    try:
        while len(head) <= HEAD_BYTES:
            piece = read(1024)  # type: ignore[operator]
            if not piece:
                return head, True
            head += piece
    except DAMAGE:
        return head, False
    return head, False


def _refuse(path: Path, head: bytes) -> None:
    start = head.lstrip()[:64]
    for magic, what, remedy in REFUSED:
        if head.startswith(magic) or (magic.startswith(b"<") and start.lower().startswith(magic.lower())):
            raise _unread(path, what, remedy)


def _unread(path: Path, what: str, remedy: str) -> DataError:
    return DataError(f"{what}: such files are not read", where=printable(str(path)), expected=READ, remedy=remedy)


def _is_binary(head: bytes) -> bool:
    """Return True if there are more NUL bytes than damage to a text leaves; readers report rows with a few of them."""
    # A file that was not written to its end is padded with NUL bytes: its rows can still be read.
    head = head.rstrip(b"\x00")
    count = head.count(b"\x00")
    if not count:
        return False
    try:
        # Up to the last line feed, so that no character is cut in half.
        head[: head.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError:
        return True
    return count > MANY_NULS * len(head)


def _is_table(text: str, columns: Collection[str], *, is_whole: bool) -> bool:
    """Return True if the text is not JSON, and its first line has two of the expected columns: a CSV under another name."""
    if not columns or text.lstrip("\ufeff \t\r\n").startswith(("{", "[", '"{')):
        return False
    mark = sniff_dialect(text, "", columns, None, is_whole=is_whole).delimiter
    header = text.lstrip("\ufeff").partition("\n")[0].split(mark)
    return sum(name.strip(' \r"') in columns for name in header) > 1


def holds_rows(text: str) -> bool:
    """Return True if the JSON object that begins here holds rows under one of WRAPPERS, as its first list of objects."""
    decoder, place = json.JSONDecoder(), 1
    while text.startswith("{") and (key := KEY.match(text, place)):
        if key[1] in WRAPPERS and LIST_OF_ROWS.match(text, key.end()):
            return True
        try:
            value, place = decoder.raw_decode(text, key.end())
        except (ValueError, RecursionError):
            return False
        comma = COMMA.match(text, place)
        if comma is None or (isinstance(value, list) and any(isinstance(entry, dict) for entry in value)):
            return False
        place = comma.end()
    return False


def _kind_of_text(text: str, is_whole: bool, suffix: str) -> Kind | None:
    text = text.lstrip("\ufeff")
    found = _json_kind(text.lstrip(), is_whole)
    if suffix in JSON_SUFFIXES:
        return found or "JSON Lines"
    is_certain = found is not None and _looks_parsed(text, is_whole)
    if suffix in TEXT_SUFFIXES:
        return found if is_certain and found == "JSON Lines" else "text"
    if suffix in CSV_SUFFIXES:
        return found if is_certain else "CSV"
    if suffix in COLUMN_SUFFIXES:
        return "Parquet" if suffix in (".parquet", ".pq") else "Arrow"
    return found or (None if text.strip() else "JSON Lines")


def _json_kind(text: str, is_whole: bool) -> Kind | None:
    """Return `JSON Lines` for one object per line; `JSON` for an array, an object that holds one, or objects over several
    lines."""
    if not text.startswith(("{", "[")):
        return None
    line, rest = [*text.split("\n", 1), ""][:2]
    is_complete = is_whole or len(line) < len(text)
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        first = None
    if text.startswith("["):
        return "JSON Lines" if first is not None and rest.lstrip().startswith("[") else "JSON"
    if first is not None:
        return "JSON" if not rest.strip() and is_whole and holds_rows(line) else "JSON Lines"
    if not is_complete:
        return "JSON" if holds_rows(line) else "JSON Lines"
    return "JSON" if _begins_over_lines(text, is_whole) else "JSON Lines"


def _shape(text: str) -> str:
    text = text.lstrip("\ufeff \t\r\n")
    if text.startswith("["):
        return "JSON array"
    return "JSON object with a list of rows" if holds_rows(text) else "JSON with objects over several lines"


def _begins_over_lines(text: str, is_whole: bool) -> bool:
    """Return True if the text begins with a JSON object over several lines."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return not is_whole and (error.pos >= len(text) - 16 or error.msg.startswith("Unterminated"))
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end] or text[end : end + 8].lstrip().startswith("{")


def _looks_parsed(text: str, is_whole: bool) -> bool:
    """Return True if the first lines are JSON objects, or the text begins as an array of objects: CSV and prose never do."""
    if re.match(r"\s*\[\s*\{\s*\"", text):
        return True
    lines = [line for line in text.split("\n")[: None if is_whole else -1] if line.strip()][:3]
    try:
        return bool(lines) and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False
