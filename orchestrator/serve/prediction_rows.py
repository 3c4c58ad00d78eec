"""Read rows of a file as questions to a bundle, and write its answers as rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from orchestrator.data.reading.chat_turns import TurnNotes
from orchestrator.data.reading.files import read_path
from orchestrator.data.reading.gather import bad_rows_text
from orchestrator.data.reading.layouts import Layout, Layouts
from orchestrator.data.reading.row import BadRow, Row, RowError
from orchestrator.errors import DataError
from orchestrator.serve.predict import Answer, Messages, Question, first_turn
from orchestrator.spec.models import DataSpec, Task
from orchestrator.spec.tasks import TASKS

NO_ANSWER = "-"
"""Placeholder for the answer that rows need not have; it is never read."""


@dataclass(frozen=True)
class Asked:
    """A row's question, with its place."""

    question: Question
    file: str
    line: int


def read_questions(pattern: str, task: Task, data: DataSpec) -> list[Asked]:
    """Read the question of every row as training read it: same layouts, templates and columns. Answers are optional and
    ignored.

    Args:
        data: The section of the spec that the bundle was trained by; a column that is missing may have its usual name.

    Raises:
        DataError: no file, no row, or rows that cannot be asked: all of them, by their reasons and lines.
    """
    reader = _QuestionReader(task, data)
    found: list[Asked] = []
    bad: list[BadRow] = []
    for row in read_path(pattern):
        asked = row if isinstance(row, BadRow) else reader.read(row)
        if isinstance(asked, BadRow):
            bad.append(asked)
        else:
            found.append(asked)
    if bad:
        count = f"{len(bad)} row{'s' if len(bad) > 1 else ''} cannot be answered"
        remedy = "fix or remove them; nothing was answered"
        raise DataError(f"{count}:\n  {bad_rows_text(bad)}", where=pattern, remedy=remedy)
    if not found:
        raise DataError("no row", where=pattern, expected="a row for every question", remedy="give another file")
    return found


class _QuestionReader:
    def __init__(self, task: Task, data: DataSpec) -> None:
        self._task: Task = task
        usual = DataSpec(train=data.train)
        specs = [data, usual] if data.format == "auto" else [data]
        self._layouts = [Layouts(task, spec, TurnNotes()) for spec in specs]
        self._answers = {spec.columns.completion: NO_ANSWER for spec in specs} | {"output": NO_ANSWER}
        self._answers |= {spec.columns.label: NO_ANSWER for spec in specs} if TASKS[task].has_labels else {}

    def read(self, row: Row) -> Asked | BadRow:
        try:
            return Asked(self._question(row), row.file, row.line)
        except RowError as problem:
            return BadRow(row.file, row.line, problem.reason, problem.detail)

    def _question(self, row: Row) -> Question:
        place = f"{row.file}:{row.line}"
        if row.is_document:
            text = str(row.values["text"])
            return Question(first_turn(text) if TASKS[self._task].uses_chat_template else text, place)
        whole = replace(row, values={**self._answers, **row.values})
        payload = self._layout(tuple(whole.values)).read(whole)
        if "messages" in payload:
            return Question(_before_answer(payload["messages"]), place, tools=payload.get("tools", ()))
        if "text" in payload:
            return Question(payload["text"], place)
        if not payload["prompt"].strip():
            raise RowError("the prompt is empty")
        return Question(payload["prompt"], place, separator=payload.get("separator"))

    def _layout(self, names: tuple[str, ...]) -> Layout:
        first: RowError | None = None
        for layouts in self._layouts:
            try:
                return layouts.choose(names)
            except RowError as problem:
                first = first or problem
        raise first or RowError("no column can be read")


def _before_answer(turns: Messages) -> Messages:
    """Return the turns before the requested answer: an answer at the end is dropped."""
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowError("there is no turn to answer")
    return turns


def answer_row(asked: Asked, answer: Answer, task: Task, *, several_files: bool) -> dict[str, Any]:
    """Return one row of the answers' file: place, question, and the answer or the class with its probabilities."""
    content = asked.question.content
    part = "messages" if not isinstance(content, str) else TASKS[task].question
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
