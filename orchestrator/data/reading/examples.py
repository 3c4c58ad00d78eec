"""Turn rows into examples, and record how they were read and which columns were not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from orchestrator.data.reading.cells import to_group
from orchestrator.data.reading.chat_turns import TurnNotes
from orchestrator.data.reading.hints import names_found
from orchestrator.data.reading.layouts import Layout, Layouts
from orchestrator.data.reading.row import BadRow, Row, RowError
from orchestrator.spec.models import JobSpec, Task
from orchestrator.spec.tasks import RETENTION_TASKS
from orchestrator.units import quoted


@dataclass(frozen=True, slots=True)
class Example:
    """One row, as the task reads it. Only the task's fields are set."""

    file: str
    line: int
    content_key: str
    """Hash of the content: equal for equal rows."""
    group: str | None = None
    source: int = 0
    """Index of the split's source that it comes from."""
    weight: float = 1.0
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    """Turns in OpenAI's form: `role`, `content` (text, or None with `tool_calls`), and other keys for the chat template."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON Schemas of the functions that a chat may call, for the chat template."""
    label: str | None = None
    separator: str | None = None
    """Text between prompt and completion; None for `data.separator`."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def retention_task(self) -> Task:
        """Task by which a row of the retention set was read."""
        if self.messages is not None:
            return "chat"
        return "text" if self.completion is None else "completion"


@dataclass
class Reading:
    """Layout by which rows with one set of columns were read, and their number."""

    names: tuple[str, ...]
    layout: Layout | None
    problem: RowError | None = None
    count: int = 0


@dataclass
class RowReader:
    """Reads the rows of one split.

    Args:
        split: `retain` is read by whatever layout fits its rows.
    """

    spec: JobSpec
    split: str
    notes: TurnNotes = field(default_factory=TurnNotes)
    readings: dict[tuple[bool, tuple[str, ...]], Reading] = field(default_factory=dict)
    _layouts: list[Layouts] = field(init=False, repr=False)
    _unread: set[str] = field(default_factory=set)
    """Columns of tables that no layout reads."""

    def __post_init__(self) -> None:
        data, is_retention = self.spec.data, self.split == "retain"
        tasks = RETENTION_TASKS if is_retention else (self.spec.task,)
        self._layouts = [Layouts(task, data, self.notes, any_format=is_retention) for task in tasks]
        self._group = None if is_retention else data.group

    @property
    def expected_columns(self) -> frozenset[str]:
        """Column names that a header is expected to have."""
        layouts = [layout for group in self._layouts for layout in group.layouts]
        names = {name for layout in layouts for name in (*layout.required, *layout.optional)}
        return frozenset(names | ({self._group} if self._group else set()))

    def choose_columns(self, names: Sequence[str]) -> Sequence[str]:
        """Return the columns of a table to read.

        Raises:
            RowError: the table does not have one.
        """
        reading = self._reading(tuple(names), is_document=False)
        if reading.layout is None:
            raise reading.problem or RowError("no column can be read")
        wanted = self._read_of(reading.layout)
        self._unread |= set(names) - wanted
        return [name for name in dict.fromkeys(names) if name in wanted]

    def read(self, row: Row, *, source: int = 0, weight: float = 1.0) -> Example | BadRow:
        """Return the row as an example; a `BadRow` says which column is missing or malformed."""
        reading = self._reading(tuple(row.values), is_document=row.is_document)
        try:
            if reading.layout is None:
                raise reading.problem or RowError("no column can be read")
            payload = reading.layout.read(row)
            separator = payload.pop("separator", None)
            group = to_group(row.values.get(self._group)) if self._group else None
            example = Example(
                file=row.file,
                line=row.line,
                content_key=content_key(payload),
                group=None if group is None else f"group/{group}",
                source=source,
                weight=weight,
                separator=separator,
                **payload,
            )
        except RowError as problem:
            return BadRow(row.file, row.line, problem.reason, problem.detail)
        reading.count += 1
        return example

    def _reading(self, names: tuple[str, ...], *, is_document: bool) -> Reading:
        known = self.readings.get((is_document, names))
        if known is None:
            try:
                known = Reading(names, self._choose(names, is_document))
            except RowError as problem:
                known = Reading(names, None, problem)
            if len(self.readings) < 10_000:
                self.readings[is_document, names] = known
        return known

    def _choose(self, names: tuple[str, ...], is_document: bool) -> Layout:
        group = self._group
        if group and self.split == "train" and group not in names and not is_document:
            raise RowError(f"no column {quoted(group)}, which data.group names", f"it has {names_found(names)}")
        problems: list[RowError] = []
        for layouts in self._layouts:
            try:
                return layouts.choose(names, is_document=is_document)
            except RowError as problem:
                problems.append(problem)
        if len(problems) == 1:
            raise problems[0]
        columns = self.spec.data.columns
        missing = f"no column {columns.text!r}, nor prompt and completion, nor messages"
        raise RowError(missing, problems[0].detail.partition(";")[0])

    def unread_columns(self) -> set[str]:
        """Return the names of columns that are not read."""
        unread = set(self._unread)
        for reading in self.readings.values():
            if reading.layout is not None and reading.count:
                unread |= set(reading.names) - self._read_of(reading.layout)
        return {str(name) for name in unread}

    @property
    def columns_look_like_alpaca(self) -> bool:
        """Return True if an Alpaca row's input is not read."""
        read = {name for reading in self.readings.values() if reading.layout and reading.count for name in reading.names}
        return self.spec.data.columns.input in self.unread_columns() and "output" in read and "instruction" in read

    def _read_of(self, layout: Layout) -> set[str]:
        return {*layout.required, *layout.optional, *([self._group] if self._group else [])}


def content_key(payload: Mapping[str, Any]) -> str:
    """Return the hash of an example's parts.

    Raises:
        RowError: a text in it is no Unicode.
    """
    if all(isinstance(value, str) for value in payload.values()):  # the same text, several times as fast
        text = f"{{{', '.join(f'{encode_basestring(key)}: {encode_basestring(payload[key])}' for key in sorted(payload))}}}"
    else:
        text = json.dumps(payload, sort_keys=True, ensure_ascii=False, default=str)
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair, which is not valid Unicode text") from None
