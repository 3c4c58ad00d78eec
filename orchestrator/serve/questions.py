"""Rows of a file as questions to a bundle, and its answers as rows of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.data.files import read_path
from orchestrator.data.reading import BadRow, Row
from orchestrator.data.rows import PARTS, to_example
from orchestrator.data.summary import listed
from orchestrator.errors import DataError
from orchestrator.serve.predict import Answer, Messages, Question, first_turn
from orchestrator.spec.models import ColumnsSpec, Task


@dataclass(frozen=True)
class Asked:
    """A row's question, and where it stands."""

    question: Question
    file: str
    line: int


def read_questions(pattern: str, task: Task, columns: Mapping[str, Any]) -> list[Asked]:
    """The questions of every row: `completion` reads the prompt's column, `chat` the messages up to the last answer (or a prompt,
    as a user's turn), `text` and `classify` the text. Answers and classes in the rows are not read.

    Args:
        columns: The spec's `data.columns`; a column that is missing may have the usual name.

    Raises:
        DataError: no file, no row, or rows that cannot be asked: all of them, by their lines.
    """
    known = ColumnsSpec.model_validate({name: value for name, value in columns.items() if name in ColumnsSpec.model_fields})
    found: list[Asked] = []
    bad: list[BadRow] = []
    for row in read_path(pattern):
        asked = row if isinstance(row, BadRow) else _question(row, task, known)
        if isinstance(asked, BadRow):
            bad.append(asked)
        else:
            found.append(asked)
    if bad:
        count = f"{len(bad)} row{'s' if len(bad) > 1 else ''} cannot be asked"
        remedy = "mend or remove them; nothing was answered"
        raise DataError(f"{count}:\n  {listed(bad)}", where=pattern, remedy=remedy)
    if not found:
        raise DataError("no row", where=pattern, expected="a row for every question", remedy="give another file")
    return found


def _question(row: Row, task: Task, columns: ColumnsSpec) -> Asked | BadRow:
    content: str | Messages | BadRow
    if task == "chat" and (name := _column(row, columns, "messages")):
        content = _conversation(row, columns.model_copy(update={"messages": name}))
    elif task in ("chat", "completion"):
        content = _text(row, columns, "prompt")
        if task == "chat" and isinstance(content, str):
            content = first_turn(content)
    else:
        content = _text(row, columns, "text")
    if isinstance(content, BadRow):
        return content
    return Asked(Question(content, f"{row.file}:{row.line}"), row.file, row.line)


def _column(row: Row, columns: ColumnsSpec, part: str) -> str | None:
    """The column that plays a part: by the spec's name, or the usual one."""
    if row.is_document and part != "messages":
        return "text"
    return next((name for name in (getattr(columns, part), part) if name in row.values), None)


def _text(row: Row, columns: ColumnsSpec, part: str) -> str | BadRow:
    name = _column(row, columns, part)
    if name is None:
        found = ", ".join(sorted(map(str, row.values))) or "none"
        return BadRow(row.file, row.line, f"no column {getattr(columns, part)!r}; it has {found}")
    value = row.values[name]
    if not isinstance(value, str) or not value.strip():
        kind = "no text" if isinstance(value, str) or value is None else f"a value of type {type(value).__name__}"
        return BadRow(row.file, row.line, f"column {name!r} holds {kind}, expected text")
    return value


def _conversation(row: Row, columns: ColumnsSpec) -> Messages | BadRow:
    """The turns up to the answer that is asked for: one that stands at the end is left out."""
    example = to_example(row, "chat", columns)
    if isinstance(example, BadRow):
        return example
    turns = tuple(example.messages or ())
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return turns or BadRow(row.file, row.line, "there is no turn that could be answered")


def answer_row(asked: Asked, answer: Answer, task: Task, *, several_files: bool) -> dict[str, Any]:
    """One line of the answers' file: the place, the question, and the answer or the class with the probabilities."""
    content = asked.question.content
    part = "messages" if not isinstance(content, str) else PARTS[task][0]
    place = {"file": asked.file, "line": asked.line} if several_files else {"line": asked.line}
    row = {**place, part: content if isinstance(content, str) else list(content)}
    if answer.probabilities is not None:
        return {
            **row,
            "class": answer.text,
            "probability": answer.probabilities[answer.text],
            "probabilities": dict(answer.probabilities),
        }
    return {**row, "answer": answer.text, "ended": answer.ended}
