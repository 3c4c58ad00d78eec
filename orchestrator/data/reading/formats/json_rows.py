"""Read rows from JSON Lines, and from JSON arrays and objects over several lines, with the line of every row."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, cast

from orchestrator.data.reading.formats.opening import DAMAGE, NOT_UTF8, open_bytes, text_chunks
from orchestrator.data.reading.formats.sniff import HEAD_BYTES, WRAPPERS, DataFile, holds_rows
from orchestrator.data.reading.row import BadRow, Row
from orchestrator.units import printable, quoted

BLANK = " \t\r\n\ufeff"


class Decoder:
    """JSON parser that remembers duplicate keys of an object, since all but one of their values would be lost."""

    def __init__(self) -> None:
        self.twice: set[str] = set()
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def parse(self, text: str) -> Any:
        """Parse a JSON text.

        Raises:
            ValueError, RecursionError: it is malformed, or nested too deeply.

        """
        self.twice.clear()
        return self._decoder.decode(text)

    def parse_at(self, text: str, position: int) -> tuple[Any, int]:
        """Return (the value that begins at `position`, its end)."""
        self.twice.clear()
        return self._decoder.raw_decode(text, position)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        # JSON allows duplicate keys, and dict() silently keeps the last.
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice.update(name for name in names if names.count(name) > 1)
        return values

    def row(self, value: Any, file: str, line: int) -> Row | BadRow:
        """Return the value parsed last, as a row."""
        if self.twice:
            names = printable(", ".join(map(repr, sorted(self.twice))))
            return BadRow(file, line, "a JSON object has the same key more than once", f"the key {names}")
        if not isinstance(value, dict):
            hint = 'such as {"text": "..."}' if isinstance(value, str) else ""
            return BadRow(file, line, f"a JSON {_KINDS.get(type(value), 'value')}, expected an object", hint)
        return Row(cast("dict[str, Any]", value), file, line)


_KINDS = {list: "list", str: "text", int: "number", float: "number", bool: "boolean", type(None): "null"}


def read_json_lines(file: DataFile) -> Iterator[Row | BadRow]:
    """Yield one object per line; blank lines are skipped."""
    decoder, name = Decoder(), str(file.path)
    for line, text in _lines(file):
        if isinstance(text, BadRow):
            yield text
            continue
        if not text.strip():
            continue
        try:
            value = decoder.parse(text)
        except json.JSONDecodeError as error:
            yield _malformed(name, line, text, error)
        except (ValueError, RecursionError) as error:
            yield BadRow(name, line, f"malformed JSON: {_too_big(error)}")
        else:
            yield decoder.row(value, name, line)


def _malformed(name: str, line: int, text: str, error: json.JSONDecodeError) -> BadRow:
    """Return what is wrong with a line, with the remedy for mistakes that affect whole files."""
    column = f"column {min(error.pos, len(text.rstrip())) + 1}"
    if "\x00" in text:
        return BadRow(name, line, "NUL bytes, which text does not contain: the file is damaged, or was not written to its end")
    if error.msg == "Extra data" and text[error.pos :].strip() == ",":
        return BadRow(name, line, "malformed JSON: a comma after the object", "remove it, or put [ and ] around all lines")
    if text.lstrip().startswith("{'"):
        return BadRow(name, line, "malformed JSON: single quotes", f"{column}; written by Python's repr? use json.dumps")
    return BadRow(name, line, f"malformed JSON: {error.msg}", column)


def _too_big(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def _lines(file: DataFile) -> Iterator[tuple[int, str | BadRow]]:
    """Yield lines as text, split at line feeds only: JSON strings may contain U+2028."""
    number, name = 0, str(file.path)
    try:
        with open_bytes(file.path, file.compression) as stream:
            # Line feeds cannot be found in the raw bytes of these encodings.
            if file.encoding in ("utf-16", "utf-32"):
                for number, text in enumerate(io.TextIOWrapper(stream, file.encoding, newline="\n"), 1):
                    yield number, text
                return
            for number, raw in enumerate(stream, 1):
                try:
                    # Only the first line can have a byte order mark. Decoded line by line, so that a bad byte costs one row.
                    yield number, raw.decode(file.encoding if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    detail = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                    yield number, BadRow(name, number, NOT_UTF8, detail)
    except UnicodeDecodeError as error:
        yield number + 1, BadRow(name, number + 1, f"damaged {file.encoding.upper()}", error.reason, ends_file=True)
    except DAMAGE as error:
        yield number + 1, cut_short(file, number + 1, error)


def cut_short(file: DataFile, line: int, error: BaseException) -> BadRow:
    """Return the error for a truncated or damaged file."""
    what = f"damaged or cut short: the {file.compression} stream" if file.compression else "cannot be read to its end: the file"
    return BadRow(str(file.path), line, f"{what} ends abruptly here", printable(str(error)), ends_file=True)


def read_json(file: DataFile) -> Iterator[Row | BadRow]:
    """Yield the objects of an array, of a list under one of WRAPPERS in an object, or consecutive objects over several lines.

    After a syntax error inside an array the start of the next object is unknown: the rest of the file is not read.
    """
    name = str(file.path)
    scanner: _Scanner | None = None
    try:
        with open_bytes(file.path, file.compression) as stream:
            scanner = _Scanner(text_chunks(stream, file.encoding))
            yield from _values(scanner, name)
    except json.JSONDecodeError as error:
        yield _broken(scanner, name, f"malformed JSON: {error.msg}")
    except UnicodeDecodeError as error:
        yield _broken(scanner, name, NOT_UTF8 if "utf-8" in file.encoding else f"damaged {file.encoding.upper()}", error.reason)
    except DAMAGE as error:
        yield cut_short(file, scanner.line if scanner else 1, error)
    except (ValueError, RecursionError) as error:
        yield _broken(scanner, name, f"malformed JSON: {_too_big(error)}")


def _broken(scanner: _Scanner | None, file: str, reason: str, detail: str = "") -> BadRow:
    rest = "the rest of the file cannot be read"
    return BadRow(file, scanner.line if scanner else 1, reason, f"{detail}; {rest}" if detail else rest, ends_file=True)


def _values(scanner: _Scanner, file: str) -> Iterator[Row | BadRow]:
    if scanner.peek() == "[":
        yield from _array(scanner, file)
        if scanner.peek():
            yield BadRow(file, scanner.line, "text after the end of the JSON array", ends_file=True)
        return
    is_first = True
    while scanner.peek():
        yield from _object(scanner, file, may_wrap=is_first)
        is_first = False


def _array(scanner: _Scanner, file: str) -> Iterator[Row | BadRow]:
    scanner.expect("[")
    while (char := scanner.peek()) != "]":
        if not char:
            yield BadRow(file, scanner.line, "the JSON array is not closed: the file is cut short", ends_file=True)
            return
        line = scanner.line
        value = scanner.value()
        yield scanner.decoder.row(value, file, line)
        if scanner.peek() not in ("]", ""):
            scanner.expect(",")
    scanner.expect("]")


def _object(scanner: _Scanner, file: str, *, may_wrap: bool) -> Iterator[Row | BadRow]:
    """Yield one object: a row, or the rows of the list that it wraps."""
    line = scanner.line
    if may_wrap and scanner.wraps_rows():
        yield from _wrapped(scanner, file)
        if scanner.peek():
            yield BadRow(file, scanner.line, "text after the end of the JSON object that holds the rows", ends_file=True)
            scanner.skip_all()
        return
    yield scanner.decoder.row(scanner.value(), file, line)


def _wrapped(scanner: _Scanner, file: str) -> Iterator[Row | BadRow]:
    """Yield the rows of the object's list; a second list of objects, such as another split, must not be lost."""
    scanner.expect("{")
    found = ""
    while scanner.peek() == '"':
        line, key = scanner.line, str(scanner.value())
        scanner.expect(":")
        if key in WRAPPERS and not found and scanner.peek() == "[":
            found = key
            yield from _array(scanner, file)
        else:
            value = scanner.value()
            if isinstance(value, list) and any(isinstance(entry, dict) for entry in cast("list[Any]", value)):
                detail = f"{quoted(key)} beside {quoted(found)}: write each into its own file" if found else quoted(key)
                yield BadRow(file, line, "the JSON object holds several lists of rows", detail, ends_file=True)
                scanner.skip_all()
                return
        if scanner.peek() != ",":
            break
        scanner.expect(",")
    scanner.expect("}")


class _Scanner:
    """JSON text read in pieces: parses value by value and counts lines."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.decoder = Decoder()
        self.line = 1
        self._chunks = chunks
        self._buffer = ""
        self._position = 0

    def peek(self) -> str:
        """Return the next character that is not blank; empty at the end."""
        while True:
            position, buffer = self._position, self._buffer
            while position < len(buffer) and buffer[position] in BLANK:
                position += 1
            self._advance(position)
            if position < len(buffer):
                return buffer[position]
            if not self._more():
                return ""

    def expect(self, char: str) -> None:
        """Skip the next character.

        Raises:
            JSONDecodeError: it is another one.
        """
        if self.peek() != char:
            raise json.JSONDecodeError(f"Expecting {char!r}", self._buffer, self._position)
        self._position += 1

    def value(self) -> Any:
        """Parse the next value.

        Raises:
            JSONDecodeError: it is malformed, or the text ends inside of it.
        """
        self.peek()
        while True:
            try:
                value, end = self.decoder.parse_at(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # A syntax error near the end of the buffer may be a value that continues in the next piece.
                near_end = error.pos >= len(self._buffer) - 16 or error.msg.startswith("Unterminated string")
                if near_end and self._more():
                    continue
                self._advance(max(self._position, min(error.pos, len(self._buffer))))
                raise
            # A number at the end of the buffer may have more digits.
            if end == len(self._buffer) and not isinstance(value, dict | list) and self._more():
                continue
            self._advance(end)
            return value

    def wraps_rows(self) -> bool:
        """Return True if the object that begins here holds its rows in a list under one of WRAPPERS."""
        while len(self._buffer) - self._position < HEAD_BYTES and self._more():
            pass
        return holds_rows(self._buffer[self._position : self._position + HEAD_BYTES])

    def skip_all(self) -> None:
        self._buffer, self._position, self._chunks = "", 0, iter(())

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _more(self) -> bool:
        """Read at least as much as is buffered, so that a long value is not parsed again for every piece."""
        waiting = self._buffer[self._position :]
        pieces, length = [waiting], 0
        for piece in self._chunks:
            pieces.append(piece)
            length += len(piece)
            if length >= max(1, len(waiting)):
                break
        if length:
            self._buffer, self._position = "".join(pieces), 0
        return length > 0
