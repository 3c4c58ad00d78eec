"""A row of a data file and its place, as yielded by every reader in `orchestrator.data.reading.formats`.

A row that cannot be read is a `BadRow` with its place, never an exception in the middle: the caller decides whether it
stops the run, and all of them are reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Row:
    """One row of a file."""

    values: dict[str, Any]
    file: str
    line: int
    """From 1: the line on which the row begins; in Parquet and Arrow the row's number."""
    is_document: bool = False
    """True if the row is text of a text file, which has no columns to rename."""
    has_absent_as_null: bool = False
    """True if an absent key reads as None, as in the structs of Parquet and Arrow."""


@dataclass(frozen=True)
class BadRow:
    """Row that cannot be used, with the reason."""

    file: str
    line: int
    reason: str
    """Same text for every row with the same problem: values of the row are in `detail`."""
    detail: str = ""
    """Value found in this row."""
    last_line: int = 0
    """Last line of a row that spans several."""
    ends_file: bool = False
    """True if the rest of the file cannot be read: never skipped, since the number of lost rows is unknown."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}-{self.last_line}" if self.last_line > self.line else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class RowError(Exception):
    """A row or a whole table cannot be used: `reason` and `detail` as in `BadRow`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Value of a Parquet or Arrow column that is not text, a number, a list or a struct, for example a date."""

    kind: str
    """Its Arrow type."""
    text: str
    """Value as Arrow formats it; empty if it cannot."""


ChooseColumns = Callable[[Sequence[str]], Sequence[str]]
"""Function from the names of a table's columns to those to read; raises RowError if a column is missing.

Raises:
    RowError: the table does not have a column.
"""


def all_columns(names: Sequence[str]) -> Sequence[str]:
    return names
