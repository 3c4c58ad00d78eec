"""Rows of every shape, and what is said about the wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.data.reading import BadRow, Row
from orchestrator.data.rows import Example, to_example, to_retention_example
from orchestrator.spec.models import ColumnsSpec, Task


def read(task: Task, values: dict[str, Any], columns: ColumnsSpec | None = None, **options: Any) -> Example | BadRow:
    return to_example(Row(values, "f.jsonl", 7), task, columns or ColumnsSpec(), **options)


@pytest.mark.parametrize(
    ("task", "values", "part", "expected"),
    [
        ("completion", {"prompt": "p", "completion": "c", "more": 1}, "completion", "c"),
        ("text", {"text": "t"}, "text", "t"),
        ("classify", {"text": "t", "label": 3}, "label", "3"),
        ("classify", {"text": "t", "label": "3"}, "label", "3"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "hi", "name": "x"}]},
            "messages",
            ({"role": "user", "content": "hi"},),
        ),
        ("chat", {"messages": '[{"role": "user", "content": "hi"}]'}, "messages", ({"role": "user", "content": "hi"},)),
    ],
)
def test_good_rows(task: Task, values: dict[str, Any], part: str, expected: Any) -> None:
    example = read(task, values)
    assert isinstance(example, Example)
    assert getattr(example, part) == expected
    assert example.place == "f.jsonl:7"


@pytest.mark.parametrize(
    ("task", "values", "reason"),
    [
        (
            "completion",
            {"question": "q", "prompt": "p"},
            "no column 'completion'; it has prompt, question (data.columns renames)",
        ),
        ("completion", {}, "no column 'prompt' and 'completion'; it has none"),
        ("completion", {"prompt": "p", "completion": 3}, "column 'completion' holds a value of type int, expected text"),
        ("completion", {"prompt": None, "completion": "c"}, "column 'prompt' holds nothing, expected text"),
        ("completion", {"prompt": "p", "completion": "x\ud800"}, "holds half of a surrogate pair (\\ud800)"),
        ("text", {"text": "  \n"}, "column 'text' is empty"),
        ("classify", {"text": "t", "label": ""}, "column 'label' is empty"),
        ("classify", {"text": "t", "label": None}, "column 'label' holds nothing, expected a label"),
        ("classify", {"text": "t", "label": True}, "type bool, expected a label"),
        ("classify", {"text": "", "label": "x"}, "column 'text' is empty"),
        ("chat", {"messages": []}, "holds an empty list, expected a list of messages"),
        ("chat", {"messages": "hi"}, "holds text that is no JSON list of messages"),
        ("chat", {"messages": ["hi"]}, "holds a value of type str at [0]"),
        ("chat", {"messages": [{"role": "bot", "content": "x"}]}, "has the role 'bot' at [0], expected one of system, user"),
        ("chat", {"messages": [{"role": "user"}]}, "at [0].content holds nothing"),
        ("chat", {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "has tool calls at [0]"),
    ],
)
def test_bad_rows(task: Task, values: dict[str, Any], reason: str) -> None:
    bad = read(task, values)
    assert isinstance(bad, BadRow)
    assert bad.place == "f.jsonl:7"
    assert reason in bad.reason


def test_columns_are_renamed_by_part_and_not_by_name() -> None:
    columns = ColumnsSpec(prompt="messages", completion="label")
    example = read("completion", {"messages": "p", "label": "c"}, columns)
    assert isinstance(example, Example)
    assert (example.prompt, example.completion) == ("p", "c")


def test_the_retention_set_may_keep_the_usual_name_and_train_may_not() -> None:
    columns = ColumnsSpec(text="body")
    assert isinstance(read("text", {"text": "t"}, columns), BadRow)
    assert isinstance(to_retention_example(Row({"text": "t"}, "f.jsonl", 7), columns), Example)
    assert isinstance(to_example(Row({"text": "t"}, "a.txt", 1, is_document=True), "text", columns), Example)


@pytest.mark.parametrize(
    ("values", "task"),
    [
        ({"text": "t", "prompt": "p", "completion": "c"}, "text"),
        ({"question": "p", "answer": "c"}, "completion"),
        ({"prompt": "p", "completion": "c"}, "completion"),
        ({"messages": [{"role": "user", "content": "u"}]}, "chat"),
    ],
)
def test_a_retention_row_is_text_or_has_answers(values: dict[str, Any], task: str) -> None:
    example = to_retention_example(Row(values, "f.jsonl", 7), ColumnsSpec(prompt="question", completion="answer"))
    assert isinstance(example, Example)
    assert example.retention_task == task


def test_a_retention_row_with_neither_says_what_it_has() -> None:
    bad = to_retention_example(Row({"prompt": "p", "body": "b"}, "f.jsonl", 7), ColumnsSpec())
    assert isinstance(bad, BadRow)
    assert "nor prompt and completion, nor messages; it has body, prompt" in bad.reason


def test_equal_content_has_an_equal_key_whatever_else_the_row_holds() -> None:
    key = lambda **values: read("completion", values).content_key  # type: ignore[union-attr] # noqa: E731
    assert key(prompt="p", completion="c", id=1) == key(completion="c", prompt="p", id=2)
    assert key(prompt="p", completion="c") != key(prompt="p", completion="d")


def test_a_group_is_a_column_that_must_be_there_and_may_be_empty() -> None:
    assert read("text", {"text": "t", "user": 3}, group="user").group == "group/3"  # type: ignore[union-attr]
    assert read("text", {"text": "t", "user": None}, group="user").group is None  # type: ignore[union-attr]
    assert isinstance(read("text", {"text": "t"}, group="user"), BadRow)
