"""Row layouts: which columns hold which part, chosen by the columns that exist or by `data.format`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.data.reading.cells import to_full_text, to_label, to_text
from orchestrator.data.reading.chat_turns import Turn, TurnNotes, read_tools, read_turns
from orchestrator.data.reading.hints import missing_hint, names_found
from orchestrator.data.reading.prompt_templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Template
from orchestrator.data.reading.row import Row, RowError
from orchestrator.spec.models import ColumnsSpec, DataFormat, DataSpec, Task
from orchestrator.spec.tasks import TASKS
from orchestrator.units import quoted

USUAL = ColumnsSpec()
Payload = dict[str, Any]
"""Fields of an `Example`."""


@dataclass(frozen=True)
class Layout:
    """A way to read rows."""

    format: DataFormat
    required: tuple[str, ...]
    """Columns that must exist."""
    optional: tuple[str, ...]
    """Columns that are read if they exist."""
    read: Callable[[Row], Payload]
    """Read a row; raises RowError."""

    def missing(self, names: Collection[str]) -> list[str]:
        return [name for name in self.required if name not in names]


class Layouts:
    """Layouts that a task can read, in the order in which they are tried.

    Args:
        notes: Gets what is noticed in the turns of chats.
        any_format: Read a row by whatever fits, and the usual names beside those of `data.columns`: the retention set is
            another data set than the target.
    """

    def __init__(self, task: Task, data: DataSpec, notes: TurnNotes, *, any_format: bool = False) -> None:
        self._task: Task = task
        self._data = data
        self._notes = notes
        self._any = any_format
        self.layouts = [layout for layout in self._all() if any_format or data.format in ("auto", layout.format)]

    def choose(self, names: Sequence[str], *, is_document: bool = False) -> Layout:
        """Return the first layout whose columns all exist.

        Raises:
            RowError: none fits; names the missing columns of the one that fits best.
        """
        if is_document:
            return self._document()
        for layout in self.layouts:
            if not layout.missing(names):
                return layout
        nearest = min(self.layouts, key=lambda layout: len(layout.missing(names)) / len(layout.required))
        missing = nearest.missing(names)
        columns = self._data.columns
        hint = missing_hint(self._task, columns, missing, names)
        if "did you mean" not in hint and nearest is not self.layouts[0]:
            first = missing_hint(self._task, columns, self.layouts[0].missing(names), names)
            hint = first if "did you mean" in first else hint
        raise RowError(f"no column {' and '.join(quoted(name) for name in missing)}", f"it has {names_found(names)}{hint}")

    def _document(self) -> Layout:
        if not TASKS[self._task].cuts_into_chunks:
            raise RowError(
                f"a text file has no columns, which task {self._task} needs",
                "only task `text` can use text files; rename it to .csv or .jsonl if it is one",
            )
        return replace(self._texts("text", None), required=("text",))

    def _all(self) -> list[Layout]:
        columns, template = self._data.columns, Template(self._data.template) if self._data.template else None
        readers: Mapping[Task, Callable[[], list[Layout]]] = {
            "chat": lambda: self._all_chats(columns, template),
            "completion": lambda: [*self._with_usual(lambda names: self._pairs(names, template), columns), self._alpaca()],
            "text": lambda: self._with_usual(lambda names: self._texts(names.text, template), columns),
            "classify": lambda: [self._labels(template)],
        }
        return readers[self._task]()

    def _all_chats(self, columns: ColumnsSpec, template: Template | None) -> list[Layout]:
        chats = [self._chats(columns.messages, "messages")]
        if columns.messages == USUAL.messages or self._any:
            chats.append(self._chats("conversations", "sharegpt"))
        elif self._data.format == "sharegpt":
            chats.append(self._chats(columns.messages, "sharegpt"))
        if self._any:
            return [self._chats(USUAL.messages, "messages"), *chats]
        return [*chats, self._pair_chats(template), self._alpaca_chats()]

    def _with_usual(self, make: Callable[[ColumnsSpec], Layout], columns: ColumnsSpec) -> list[Layout]:
        return [make(columns), make(USUAL)] if self._any and columns != USUAL else [make(columns)]

    def _texts(self, name: str, template: Template | None) -> Layout:
        make, used = _maker(name, template, to_full_text)
        return Layout("text", used, (), lambda row: {"text": make(row)})

    def _labels(self, template: Template | None) -> Layout:
        label = self._data.columns.label
        make, used = _maker(self._data.columns.text, template, to_full_text)

        def read(row: Row) -> Payload:
            return {"text": make(row), "label": to_label(row.values[label], label)}

        return Layout("labels", _unique((*used, label)), (), read)

    def _pairs(self, columns: ColumnsSpec, template: Template | None) -> Layout:
        prompt, used = _maker(columns.prompt, template, to_text)
        completion = columns.completion

        def read(row: Row) -> Payload:
            return {"prompt": prompt(row), "completion": to_full_text(row.values[completion], completion)}

        return Layout("prompt_completion", _unique((*used, completion)), (), read)

    def _alpaca_names(self) -> tuple[str, str, str]:
        """Return (instruction, input, output): `data.columns` renames them if Alpaca rows are requested."""
        columns = self._data.columns
        is_asked = self._data.format == "alpaca"
        instruction = columns.prompt if is_asked and columns.prompt != USUAL.prompt else "instruction"
        output = columns.completion if is_asked and columns.completion != USUAL.completion else "output"
        return instruction, columns.input, output

    def _alpaca(self) -> Layout:
        instruction, given, output = self._alpaca_names()
        own = not self._any and self._data.template
        with_input = Template(self._data.template if own and self._data.template else ALPACA_WITH_INPUT)
        without = self._data.template_without_input if not self._any else None
        without_input = Template(without or (with_input.text if own else ALPACA_WITHOUT_INPUT))

        def read(row: Row) -> Payload:
            values = row.values
            if values.get("history"):
                raise RowError("column 'history' holds earlier turns, which task completion cannot use: set task: chat")
            parts = {**values, "instruction": to_full_text(values[instruction], instruction), "input": values.get(given)}
            template = with_input if _is_full(values.get(given), given) else without_input
            answer = to_full_text(values[output], output)
            return {"prompt": template.fill(parts), "completion": answer, "separator": ""}

        used = [name for name in (*with_input.columns, *without_input.columns) if name not in ("instruction", "input")]
        return Layout("alpaca", _unique((instruction, output, *used)), (given, "history"), read)

    def _chats(self, name: str, format: DataFormat) -> Layout:
        columns = self._data.columns

        def read(row: Row) -> Payload:
            return self._chat(row, self._turns(row, name))

        return Layout(format, (name,), (columns.system, columns.tools, "functions"), read)

    def _pair_chats(self, template: Template | None) -> Layout:
        """Read prompt and completion as turns; if they are lists of turns, only the completion's are trained on, as in TRL."""
        columns = self._data.columns
        prompt, used = _maker(columns.prompt, template, to_full_text)
        completion = columns.completion

        def read(row: Row) -> Payload:
            if template is None and isinstance(row.values[columns.prompt], list):
                before = tuple(
                    {**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in self._turns(row, columns.prompt)
                )
            else:
                before = (_said("user", prompt(row)),)
            if isinstance(row.values[completion], list):
                after = self._turns(row, completion)
            else:
                after = (_said("assistant", to_full_text(row.values[completion], completion)),)
            return self._chat(row, (*before, *after))

        return Layout("prompt_completion", _unique((*used, completion)), (columns.system, columns.tools), read)

    def _alpaca_chats(self) -> Layout:
        """Read the instruction, then the input, as the user's turn; `history` as earlier ones, as LLaMA-Factory documents it."""
        instruction, given, output = self._alpaca_names()
        columns = self._data.columns
        template = Template(self._data.template) if self._data.template else None

        def read(row: Row) -> Payload:
            values = row.values
            asked = to_full_text(values[instruction], instruction)
            if template is not None:
                asked = template.fill({**values, "instruction": asked, "input": values.get(given)})
            elif _is_full(values.get(given), given):
                asked = f"{asked}\n{to_text(values[given], given)}"
            answer = _said("assistant", to_full_text(values[output], output))
            return self._chat(row, (*_history(values.get("history")), _said("user", asked), answer))

        optional = (given, "history", columns.system, columns.tools)
        used = [name for name in (template.columns if template else ()) if name not in ("instruction", "input")]
        return Layout("alpaca", _unique((instruction, output, *used)), optional, read)

    def _turns(self, row: Row, name: str) -> tuple[Turn, ...]:
        value, place = row.values[name], f"{row.file}:{row.line}"
        return read_turns(value, name, place, self._notes, absent_as_null=row.has_absent_as_null)

    def _chat(self, row: Row, turns: tuple[Turn, ...]) -> Payload:
        """Read the turns after the row's system text, and its tools."""
        columns = self._data.columns
        system = row.values.get(columns.system)
        if _is_full(system, columns.system):
            if turns[0]["role"] == "system":
                raise RowError(f"column {quoted(columns.system)} holds a system text, and so does the first turn")
            turns = (_said("system", to_text(system, columns.system)), *turns)
        given = row.values.get(columns.tools)
        name = columns.tools if given is not None else "functions"
        tools = read_tools(row.values.get(name), name, absent_as_null=row.has_absent_as_null)
        return {"messages": turns, "tools": tools} if tools else {"messages": turns}


def _maker(
    name: str, template: Template | None, check: Callable[[Any, str], str]
) -> tuple[Callable[[Row], str], tuple[str, ...]]:
    """Return (function from a row to a part's text, the columns that it reads), for one column or the template."""
    if template is None:
        return lambda row: check(row.values[name], name), (name,)
    return lambda row: check(template.fill(row.values), name), template.columns


def _said(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _history(value: Any) -> list[Turn]:
    turns: list[Turn] = []
    for entry in value or ():
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise RowError("column 'history' does not hold a list of [question, answer] pairs")
        turns += [_said("user", to_text(entry[0], "history")), _said("assistant", to_text(entry[1], "history"))]
    return turns


def _is_full(value: Any, name: str) -> bool:
    return value is not None and bool(to_text(value, name).strip())


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
