"""Convert one value of a row to text, a class or a group name."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from orchestrator.data.reading.row import RowError, Unreadable
from orchestrator.units import printable, quoted

KINDS = {dict: "an object", list: "a list", tuple: "a list", bytes: "bytes", set: "a set"}


def to_text(value: Any, name: str) -> str:
    """Return strings unchanged; whole numbers as digits, `3.0` too; other numbers in their shortest form; `true` and `false`.

    So a class is the same whether a file writes 1, 1.0 or "1". Bytes are text if they are UTF-8.

    Raises:
        RowError: it is missing, or not text.

    """
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value, name)
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal):
        return _number(value, name)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise RowError(f"column {quoted(name)} holds bytes that are not text, expected text") from None
    if isinstance(value, Unreadable):
        kind = printable(value.kind)
        raise RowError(f"column {quoted(name)} holds a value of type {kind}, expected text: write it as text in the file")
    raise RowError(f"column {quoted(name)} holds {kind_of(value)}, expected text", _hint(value))


def _hint(value: Any) -> str:
    """Return what a value that is not text probably is."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].keys() & {"role", "from"}:
        return "turns of a chat? set task: chat"
    if (isinstance(value, dict) and "0" in value) or (isinstance(value, list) and len(value) > 1):
        return "a table written by columns? pandas writes rows with to_json(path, orient='records', lines=True)"
    return ""


def to_full_text(value: Any, name: str) -> str:
    """Return `to_text`, which must contain more than white space."""
    text = to_text(value, name)
    if not text or text.isspace():
        raise RowError(f"column {quoted(name)} is empty" + (" (white space only)" if text else ""))
    return text


def to_label(value: Any, name: str) -> str:
    """Return a class name from text, a whole number or a boolean."""
    if isinstance(value, float | Decimal) and value == value and value != int(value if abs(value) != float("inf") else 0):
        raise RowError(f"column {quoted(name)} holds a number that is not whole, expected a class: text or a whole number")
    if isinstance(value, list | tuple):
        raise RowError(f"column {quoted(name)} holds a list, expected one class: several labels per row are not supported")
    return to_full_text(value, name)


def to_group(value: Any) -> str | None:
    """Return the name of a row's group; None if the cell is empty."""
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        return None
    if isinstance(value, Unreadable):
        return value.text or None
    return _number(value, "") if isinstance(value, float | Decimal) else str(value)


def kind_of(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    return KINDS.get(type(value)) or ("a boolean" if isinstance(value, bool) else f"a value of type {type(value).__name__}")


def _number(value: float | Decimal, name: str) -> str:
    if value != value or abs(value) == float("inf"):
        raise RowError(f"column {quoted(name)} holds NaN or infinity, expected text")
    if value == int(value):
        return str(int(value))
    return format(value.normalize(), "f") if isinstance(value, Decimal) else repr(value)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f" of column {quoted(name)}" if name else ""
        raise RowError(
            f"half of a surrogate pair, which is not valid Unicode text{where}", f"\\u{ord(text[error.start]):04x}"
        ) from None
