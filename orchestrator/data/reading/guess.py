"""Guess from its first rows the task that a data file is for, and the columns that hold its parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from orchestrator.data.reading.files import read_path
from orchestrator.data.reading.row import BadRow, Row
from orchestrator.errors import DataError
from orchestrator.spec.models import Task
from orchestrator.units import printable

MAX_ROWS = 50_000
"""Number of rows that are read: a file sorted by class shows only the first class for long."""
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("input", "output"),
    ("input", "target"),
    ("inputs", "targets"),
    ("source", "target"),
    ("src", "tgt"),
    ("query", "response"),
    ("query", "answer"),
    ("context", "response"),
    ("problem", "solution"),
    ("user", "assistant"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("text", "target"),
    ("text", "completion"),
)
"""Names of prompt and answer columns, the most likely pair first."""
ALPACA = ("instruction", "input", "output")
"""Columns of `data.format: alpaca`, which `auto` recognises."""
MESSAGES = ("messages", "conversations", "conversation", "dialog", "chat", "turns")
TEXTS = (
    "text",
    "sentence",
    "content",
    "body",
    "document",
    "review",
    "comment",
    "message",
    "utterance",
    "question",
    "query",
    "title",
)
LABELS = (
    "label",
    "labels",
    "class",
    "category",
    "intent",
    "sentiment",
    "emotion",
    "topic",
    "target",
    "tag",
    "rating",
    "stars",
    "type",
    "label_text",
)
MAX_CLASSES = 20
"""Most different values of a label column that is not named like one."""
MAX_CLASS_CHARACTERS = 60
"""Maximum characters of a class name."""


@dataclass(frozen=True)
class Guess:
    """Guessed task and columns of a data file."""

    task: Task
    columns: Mapping[str, str]
    """Part (`prompt`, `completion`, ...) -> its column; for Alpaca rows `instruction`, `input` and `output`."""
    why: str
    """Reason for the guess, in a few words."""
    rows: tuple[Row, ...]
    unused: tuple[str, ...]
    """Columns that the task does not read."""
    num_classes: int = 0
    bad: tuple[BadRow, ...] = ()
    """First rows that cannot be read."""

    @property
    def has_more(self) -> bool:
        """True if there are rows that were not read."""
        return len(self.rows) == MAX_ROWS


def guess_use(pattern: str, task: Task | None = None) -> Guess:
    """Guess what `pattern` (a file, a folder, a glob) is for.

    Args:
        task: The task, if it is known: then only the columns are guessed.

    Raises:
        DataError: no file, no row, or no columns for any task; names the columns that exist.
    """
    rows, bad = _first_rows(pattern)
    if not rows:
        first = f"; {bad[0]}" if bad else ""
        raise DataError(f"no row can be read{first}", where=pattern, remedy="fix the file, or give another")
    found = _guess(_Table(rows), task)
    if found is None:
        columns = ", ".join(printable(name) for name in _Table(rows).names) or "none"
        wanted = f"the task {task}" if task else "a task"
        raise DataError(
            f"no columns for {wanted} were found; the rows have {columns}",
            where=pattern,
            expected="a chat's messages, a prompt and its answer, a text and its class, or a text",
            remedy="give --task, rename the columns, or write the spec by hand with data.columns",
        )
    chosen, columns, why, num_classes = found
    unused = tuple(name for name in _Table(rows).names if name not in columns.values())
    return Guess(chosen, columns, why, tuple(rows), unused, num_classes, tuple(bad))


def _first_rows(pattern: str) -> tuple[list[Row], list[BadRow]]:
    rows: list[Row] = []
    bad: list[BadRow] = []
    for row in islice(read_path(pattern), MAX_ROWS):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            rows.append(row)
    return rows, bad


_Found = tuple[Task, dict[str, str], str, int]


class _Table:
    """Columns of rows, found by lower-case name."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.names = list(dict.fromkeys(str(name) for row in rows for name in row.values))
        self._by_name = {name.lower(): name for name in reversed(self.names)}

    def named(self, names: Iterable[str]) -> list[str]:
        """Return the columns that have one of these names, in their order."""
        return [self._by_name[name] for name in names if name in self._by_name]

    def values(self, column: str) -> list[Any]:
        found = (row.values.get(column) for row in self.rows)
        return [value for value in found if value is not None and value != ""]

    def is_text(self, column: str) -> bool:
        """Return True if nearly every row has text in the column that is not all one number."""
        values = self.values(column)
        texts = [value for value in values if isinstance(value, str)]
        return bool(texts) and len(texts) == len(values) and not all(map(_is_number, texts[:1000]))

    def mean_length(self, column: str) -> float:
        values = [len(value) for value in self.values(column) if isinstance(value, str)]
        return sum(values) / max(1, len(values))

    def classes(self, column: str) -> set[str]:
        """Return the column's values if they could be classes, else nothing."""
        values = self.values(column)
        if any(isinstance(value, list | dict) or (isinstance(value, float) and not value.is_integer()) for value in values):
            return set()
        found = {str(value) for value in values}
        return found if all(len(name) <= MAX_CLASS_CHARACTERS for name in found) else set()


def _guess(table: _Table, task: Task | None) -> _Found | None:
    if task is None and all(row.is_document for row in table.rows):
        return "text", {"text": "text"}, "text files, each a document", 0
    if task is not None:
        return FINDERS[task](table, True)
    return next((found for find in FINDERS.values() if (found := find(table, False)) is not None), None)


def _chat(table: _Table, asked: bool) -> _Found | None:
    candidates = [*table.named(MESSAGES), *table.names]
    column = next((name for name in candidates if _holds_messages(table.values(name))), None)
    return ("chat", {"messages": column}, f"the column {printable(column)} holds messages", 0) if column else None


def _holds_messages(values: list[Any]) -> bool:
    """Return True if the first values are lists of turns with role and content, by either usual pair of names."""
    if not values:
        return False
    for value in values[:20]:
        turns = value
        if isinstance(value, str):
            try:
                turns = json.loads(value) if value.lstrip().startswith("[") else None
            except (ValueError, RecursionError):
                return False
        if not isinstance(turns, list) or not turns:
            return False
        if not all(isinstance(turn, dict) and ({"role"} <= turn.keys() or {"from", "value"} <= turn.keys()) for turn in turns):
            return False
    return True


def _completion(table: _Table, asked: bool) -> _Found | None:
    if table.named(ALPACA) == list(ALPACA):
        return "completion", {name: name for name in ALPACA}, "instruction, input and output are Alpaca's columns", 0
    for names in PAIRS:
        columns = table.named(names)
        if len(columns) == 2:
            prompt, answer = columns
            return (
                "completion",
                {"prompt": prompt, "completion": answer},
                f"{printable(prompt)} and {printable(answer)} are a pair",
                0,
            )
    texts = [name for name in table.names if table.is_text(name)]
    if asked and len(texts) == 2:
        prompt, answer = texts
        return "completion", {"prompt": prompt, "completion": answer}, "the only two columns of text", 0
    return None


def _classify(table: _Table, asked: bool) -> _Found | None:
    """Find a label by its name, or a column with few values; and the text that it labels."""
    count = len(table.rows)
    pairs = [table.named(names) for names in PAIRS]
    answers = [pair[1] for pair in pairs if len(pair) == 2]
    named = [name for name in table.named(LABELS) if 2 <= len(table.classes(name)) <= max(2, count // 2)]
    others = [name for name in (*answers[:1], *table.names) if name not in named]
    few = [name for name in others if 2 <= len(table.classes(name)) <= min(MAX_CLASSES, count // 5)]
    if answers and not asked:  # a pair by name is a completion, unless its answers are few
        candidates = [name for name in (*named, *few) if name in answers]
    else:
        candidates = [*named, *(few if asked or len(table.names) == 2 else [])]
    for label in candidates:
        texts = [name for name in table.names if name != label and table.is_text(name)]
        if texts:
            usual = [name for name in table.named(TEXTS) if name in texts]
            text = usual[0] if usual else max(texts, key=table.mean_length)
            number = len(table.classes(label))
            why = f"{printable(label)} has {number} different values in {count:,} rows"
            return "classify", {"text": text, "label": label}, why, number
    return None


def _text(table: _Table, asked: bool) -> _Found | None:
    texts = [name for name in table.names if table.is_text(name)]
    usual = [name for name in table.named(TEXTS) if name in texts]
    column = usual[0] if usual else texts[0] if len(texts) == 1 or (asked and texts) else None
    return ("text", {"text": column}, f"{printable(column)} is text, and no column looks like its answer", 0) if column else None


FINDERS: Mapping[Task, Callable[[_Table, bool], _Found | None]] = {
    "chat": _chat,
    "classify": _classify,
    "completion": _completion,
    "text": _text,
}
"""Finds the columns of a task, given whether the user named the task. Without a task the first that finds columns decides."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def contents(look: Guess, most: int) -> list[str]:
    """Return approximately what the model would read of the first rows: the parts of each, concatenated."""
    return ["\n".join(_flat(row.values.get(column)) for column in look.columns.values()) for row in look.rows[:most]]


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_flat(item) for item in value)
    if isinstance(value, dict):
        return "\n".join(f"<|{key}|>{_flat(inner)}" for key, inner in value.items())
    return "" if value is None else str(value)
