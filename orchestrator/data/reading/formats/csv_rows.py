"""Read rows from CSV, with the lines that each of them spans."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from orchestrator.data.reading.formats.json_rows import cut_short
from orchestrator.data.reading.formats.opening import DAMAGE, NOT_UTF8, open_bytes
from orchestrator.data.reading.formats.sniff import DataFile
from orchestrator.data.reading.row import BadRow, ChooseColumns, Row, RowError
from orchestrator.units import printable

csv.field_size_limit(2**31 - 1)


def read_csv(file: DataFile, choose: ChooseColumns) -> Iterator[Row | BadRow]:
    """Yield rows; a row's line is the one it begins on: a quoted field may span several."""
    name = str(file.path)
    try:
        with open_bytes(file.path, file.compression) as stream:
            # A byte that is not UTF-8 becomes a surrogate, so that only its row is bad and reading goes on.
            errors = "surrogateescape" if "utf-8" in file.encoding else "strict"
            lines = io.TextIOWrapper(stream, file.encoding, errors=errors, newline="")
            for _ in range(file.dialect.skip_lines):
                lines.readline()
            yield from _Table(file, lines).rows(choose)
    except UnicodeDecodeError as error:
        yield BadRow(name, 1, f"damaged {file.encoding.upper()}", error.reason, ends_file=True)


class _Table:
    def __init__(self, file: DataFile, lines: io.TextIOWrapper) -> None:
        self._file = file
        self._name = str(file.path)
        dialect = file.dialect
        self._before = dialect.skip_lines
        self._reader = csv.reader(lines, delimiter=dialect.delimiter, skipinitialspace=dialect.skips_blanks, strict=True)

    def rows(self, choose: ChooseColumns) -> Iterator[Row | BadRow]:
        name = self._name
        chosen: list[tuple[str, int]] = []
        header: list[str] | None = None
        for line, fields in self._records():
            if isinstance(fields, BadRow):
                yield fields
                if header is None:
                    return
            elif header is None:
                header = [column.strip() for column in fields]
                try:
                    chosen = _chosen(header, choose)
                except RowError as problem:
                    yield BadRow(name, line, problem.reason, _about_header(problem.detail, header), ends_file=True)
                    return
            # An empty line gives no fields and is skipped; separators without text are a mistake worth reporting.
            elif not any(fields):
                if fields:
                    yield BadRow(name, line, "every field of the row is empty")
            elif len(fields) == len(header):
                values = {column: fields[index] for column, index in chosen}
                problem = _problem(values.values())
                yield BadRow(name, line, problem) if problem else Row(values, name, line)
            else:
                what = "more fields than the header" if len(fields) > len(header) else "fewer fields than the header"
                shown = printable(", ".join(header))
                last = self._reader.line_num + self._before
                yield BadRow(name, line, what, f"{len(fields)}; the header has {len(header)}: {shown}", last)

    def _records(self) -> Iterator[tuple[int, list[str] | BadRow]]:
        """Yield (first line, fields) of each record; an unclosed quote is reported with the lines it spans."""
        while True:
            line = self._reader.line_num + self._before + 1
            try:
                yield line, next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                last = self._reader.line_num + self._before
                # The csv module has one error type; its message tells an unclosed quote from other mistakes.
                if "unexpected end" in str(error):
                    count = last - line + 1
                    detail = f"{count} line{'s' if count > 1 else ''} to the end of the file"
                    yield line, BadRow(self._name, line, "a quote is opened and never closed", detail, last, ends_file=True)
                    return
                hint = "inside a quoted field a quote is written as two" if "expected after" in str(error) else ""
                yield line, BadRow(self._name, line, f"malformed CSV: {printable(str(error))}", hint, last)
            except UnicodeDecodeError as error:
                yield line, BadRow(self._name, line, f"damaged {self._file.encoding.upper()}", error.reason, ends_file=True)
                return
            except DAMAGE as error:
                yield line, cut_short(self._file, line, error)
                return


def _chosen(header: Sequence[str], choose: ChooseColumns) -> list[tuple[str, int]]:
    """Return (name, index) of the columns to read.

    Raises:
        RowError: one of them is missing, or there twice.
    """
    names = list(choose(header))
    twice = sorted({name for name in names if header.count(name) > 1})
    if twice:
        raise RowError("the header names a column more than once", printable(", ".join(map(repr, twice))))
    return [(name, header.index(name)) for name in names]


def _about_header(detail: str, header: Sequence[str]) -> str:
    """Return how the file's first line was interpreted, unless its columns are nearly the expected ones."""
    if "did you mean" in detail:
        return detail
    hint = "; no delimiter was found: data.delimiter names it" if len(header) == 1 else ""
    return f"{detail}; the first line is taken as the names of the columns{hint}"


def _problem(fields: Iterable[str]) -> str:
    """Return why fields are not text, if so: a byte that is not UTF-8 has become a lone surrogate."""
    for field in fields:
        if not field.isascii():
            try:
                field.encode()
            except UnicodeEncodeError:
                return NOT_UTF8
        if "\x00" in field:
            return "NUL bytes, which text does not contain: the file is damaged, or was not written to its end"
    return ""
