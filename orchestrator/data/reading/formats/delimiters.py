"""Find the delimiter of a CSV file from its header and first rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}
USUAL = {".tsv": "\t", ".tab": "\t", ".psv": "|"}
"""Usual delimiter by suffix; a comma otherwise."""
SAMPLE_ROWS = 50


@dataclass(frozen=True)
class Dialect:
    """Format of a CSV file."""

    delimiter: str = ","
    skip_lines: int = 0
    """Number of lines before the header: 1 if a spreadsheet wrote `sep=;`."""
    skips_blanks: bool = False
    """True if a blank follows each delimiter."""


def sniff_dialect(text: str, suffix: str, columns: Collection[str], given: str | None, *, is_whole: bool) -> Dialect:
    """Find the delimiter.

    The header decides where one delimiter alone gives the expected columns. Otherwise the one under which most of the first
    rows have as many fields as the header counts, of at least two; of equals the one that gives more fields, then the one
    that the file's name suggests.

    Args:
        text: The file's beginning.
        columns: Names that the header is expected to have.
        given: Overrides what is found.
    """
    line, _, rest = text.lstrip("\ufeff").partition("\n")
    declared = line.strip().strip('"')
    # Written by spreadsheets in locales where the comma is the decimal mark.
    if declared.startswith("sep=") and len(declared) == 5:
        return Dialect(given or declared[4], 1, _has_blanks(rest, declared[4]))
    usual = USUAL.get(suffix, ",")
    if given:
        return Dialect(given, 0, _has_blanks(text, given))
    scores = {mark: _score(text, mark, columns, is_whole) for mark in (usual, *(m for m in DELIMITER_NAMES if m != usual))}
    # max keeps the first of equals, which is the usual delimiter of the suffix.
    best = max(scores, key=lambda mark: scores[mark])
    return Dialect(best, 0, _has_blanks(text, best))


def _score(text: str, delimiter: str, columns: Collection[str], is_whole: bool) -> tuple[int, float, int]:
    """Return (expected columns in the header, share of rows with as many fields, fields); zeros for a single column."""
    rows = _rows(text, delimiter, is_whole)
    if not rows or len(rows[0]) < 2:
        named = sum(name.strip() in columns for name in rows[0]) if rows else 0
        return named, 0.0, 0
    header = [name.strip() for name in rows[0]]
    fitting = sum(len(row) == len(header) for row in rows[1:])
    return sum(name in columns for name in header), fitting / max(1, len(rows) - 1), len(header)


def _rows(text: str, delimiter: str, is_whole: bool) -> list[Sequence[str]]:
    """Return the header and the first rows that are not blank, as far as they can be parsed."""
    # The last line of a partial head is probably cut, and would count as a bad row.
    lines = text if is_whole else text[: text.rfind("\n") + 1] or text
    reader = csv.reader(io.StringIO(lines.lstrip("\ufeff"), newline=""), delimiter=delimiter)
    rows: list[Sequence[str]] = []
    try:
        for fields in reader:
            if fields:
                rows.append(fields)
            if len(rows) > SAMPLE_ROWS:
                break
    except csv.Error:
        pass  # the rows up to there decide; the reader reports what is malformed, with its line
    return rows


def _has_blanks(text: str, delimiter: str) -> bool:
    header = text.lstrip("\ufeff").partition("\n")[0].split(delimiter)
    return len(header) > 1 and all(name.startswith(" ") for name in header[1:])
