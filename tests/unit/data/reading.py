"""Reading single files in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.data.reading.formats import read_rows, sniff
from orchestrator.data.reading.row import BadRow, Row


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, *columns: str, **options: Any) -> tuple[list[tuple[int, dict]], list[tuple[int, str]]]:
    """(line, values) of good rows, (line, reason) of bad ones."""
    rows = list(
        read_rows(sniff(path, columns=columns), lambda names: [n for n in names if not columns or n in columns], **options)
    )
    assert all(row.file == str(path) for row in rows)
    good = [(row.line, row.values) for row in rows if isinstance(row, Row)]
    return good, [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]


def bad_rows(path: Path) -> list[BadRow]:
    return [row for row in read_rows(sniff(path)) if isinstance(row, BadRow)]
