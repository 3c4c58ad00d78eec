"""From a row to an example: the columns that the task reads, checked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from orchestrator.data.reading import BadRow, Row
from orchestrator.spec.models import ColumnsSpec, Task

ROLES = ("system", "user", "assistant", "tool")
PARTS: dict[Task, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
    "classify": ("text", "label"),
}
"""What each task reads of a row; `data.columns` says under which names."""
RETENTION_TASKS: tuple[Task, ...] = ("text", "completion", "chat")
"""How a row of the retention set may be read, the first that it has the columns for."""
Payload = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row, as the task reads it. Only the task's parts are set."""

    file: str
    line: int
    content_key: str
    """Hash of the content: equal for equal rows."""
    group: str | None = None
    source: int = 0
    """Which of the split's sources it comes from."""
    weight: float = 1.0
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    """Turns in OpenAI's form: `role`, `content` (text, or None beside `tool_calls`), and what else the chat template may read."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON Schemas of the functions that a chat may call, for the chat template."""
    label: str | None = None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def retention_task(self) -> Task:
        """How a row of the retention set was read."""
        if self.messages is not None:
            return "chat"
        return "text" if self.completion is None else "completion"


def to_retention_example(row: Row, columns: ColumnsSpec) -> Example | BadRow:
    """A row of the retention set: its text, or else its prompt and completion, or its messages, whose answers can be checked.

    It is another data set than the target, with names of its own: a column whose name in `columns` is missing may have the
    usual one.
    """
    usual = ColumnsSpec()
    for task in RETENTION_TASKS:
        given = {part: getattr(columns, part) for part in PARTS[task]}
        names = {part: name if name in row.values else getattr(usual, part) for part, name in given.items()}
        if all(name in row.values for name in names.values()):
            return to_example(row, task, columns.model_copy(update=names))
    found = ", ".join(sorted(map(str, row.values))) or "none"
    return _bad(
        row, f"no column {columns.text!r}, nor prompt and completion, nor messages; it has {found} (data.columns renames)"
    )


def to_example(row: Row, task: Task, columns: ColumnsSpec, *, group: str | None = None) -> Example | BadRow:
    """Read a row by the task's columns; a `BadRow` says which column is missing, or holds what it should not.

    Args:
        group: The column whose rows stay in one split.
    """
    names = {part: getattr(columns, part) for part in PARTS[task]}
    if "text" in names and names["text"] not in row.values and row.is_document:
        names["text"] = "text"
    missing = [name for name in (*names.values(), *([group] if group else [])) if name not in row.values]
    if missing:
        found = ", ".join(sorted(map(str, row.values))) or "none"
        return _bad(row, f"no column {' and '.join(map(repr, missing))}; it has {found} (data.columns renames)")
    payload: Payload = {}
    for part, name in names.items():
        value, problem = _READERS[part](row.values[name])
        if problem:
            return _bad(row, f"column {name!r} {problem}")
        payload[part] = value
    value = row.values.get(group) if group else None
    group_name = None if value is None else f"group/{value}"
    return Example(file=row.file, line=row.line, content_key=_key(payload), group=group_name, **payload)


Read = tuple[Any, str]
"""A part's value and what is wrong with it (empty: nothing)."""


def _text(value: Any) -> Read:
    if not isinstance(value, str):
        return None, f"holds {_kind(value)}, expected text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return None, f"holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), which is no Unicode text"
    return value, ""


def _full_text(value: Any) -> Read:
    text, problem = _text(value)
    return text, problem or ("" if text.strip() else "is empty")


def _label(value: Any) -> Read:
    """Whole numbers and their digits are one class: CSV knows no numbers, JSON and Parquet do."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None, f"holds {_kind(value)}, expected a label: text or a whole number"
    return _full_text(str(value))


def _messages(value: Any) -> Read:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None, "holds text that is no JSON list of messages"
    if not isinstance(value, list) or not value:
        return None, f"holds {_kind(value) if value != [] else 'an empty list'}, expected a list of messages"
    turns: list[dict[str, str]] = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            return None, f"holds {_kind(turn)} at [{index}], expected {{role, content}}"
        if turn.get("role") not in ROLES:
            return None, f"has the role {turn.get('role')!r} at [{index}], expected one of {', '.join(ROLES)}"
        if turn.get("tool_calls"):
            return None, f"has tool calls at [{index}], which are not learned from: write them into 'content'"
        content, problem = _text(turn.get("content"))
        if problem:
            return None, f"at [{index}].content {problem}"
        turns.append({"role": turn["role"], "content": content})
    return tuple(turns), ""


_READERS = {
    "prompt": _text,
    "completion": _text,
    "messages": _messages,
    "text": _full_text,
    "label": _label,
}


def _key(payload: Payload) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _bad(row: Row, reason: str) -> BadRow:
    return BadRow(row.file, row.line, reason)
