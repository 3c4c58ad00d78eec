"""Rows of every layout, and what is said about the wrong ones."""

from __future__ import annotations

import decimal
import hashlib
import json
from typing import Any

import pytest

from orchestrator.data.reading.examples import Example, RowReader, content_key
from orchestrator.data.reading.prompt_templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from orchestrator.data.reading.row import BadRow, Row, Unreadable
from orchestrator.spec.models import JobSpec, Task


def reader(task: Task, split: str = "train", **data: Any) -> RowReader:
    values = {"name": "t", "base": {"model": "sample"}, "task": task, "data": {"train": "a", **data}}
    return RowReader(JobSpec.model_validate_json(json.dumps(values)), split)


def read(task: Task, values: dict[str, Any], split: str = "train", **data: Any) -> Example | BadRow:
    return reader(task, split, **data).read(Row(values, "f.jsonl", 7))


U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "ho"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}


@pytest.mark.parametrize(
    ("task", "values", "part", "expected"),
    [
        ("completion", {"prompt": "p", "completion": "c", "more": 1}, "completion", "c"),
        ("completion", {"prompt": 1, "completion": True}, "completion", "true"),
        ("completion", {"prompt": 1, "completion": 3.0}, "completion", "3"),
        ("completion", {"prompt": "", "completion": 0.25}, "completion", "0.25"),
        ("completion", {"prompt": "p", "completion": decimal.Decimal("2.50")}, "completion", "2.5"),
        ("completion", {"prompt": "p", "completion": b"bytes"}, "completion", "bytes"),
        ("text", {"text": "t"}, "text", "t"),
        ("classify", {"text": "t", "label": 3}, "label", "3"),
        ("classify", {"text": "t", "label": "3"}, "label", "3"),
        ("classify", {"text": "t", "label": 3.0}, "label", "3"),
        ("classify", {"text": "t", "label": False}, "label", "false"),
        ("chat", {"messages": [U, A]}, "messages", (U, A)),
        ("chat", {"messages": json.dumps([U, A])}, "messages", (U, A)),
        ("chat", {"messages": [{**U, "name": "x"}, A]}, "messages", ({**U, "name": "x"}, A)),
        ("chat", {"messages": [{"role": "developer", "content": "s"}, U]}, "messages", ({"role": "system", "content": "s"}, U)),
        ("chat", {"messages": [U, {**A, "weight": 0}]}, "messages", (U, {**A, "weight": 0})),
        ("chat", {"messages": [U, {**A, "reasoning_content": "r"}]}, "messages", (U, {**A, "reasoning_content": "r"})),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, A]},
            "messages",
            (U, A),
        ),
        ("chat", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, "messages", (U, A)),
        (
            "chat",
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "bard", "value": "ho"}], "system": "s"},
            "messages",
            ({"role": "system", "content": "s"}, U, A),
        ),
        (
            "chat",
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "function_call", "value": '{"name": "find", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "o"},
                    {"from": "gpt", "value": "ho"},
                ],
                "tools": '[{"name": "find", "parameters": {}}]',
            },
            "messages",
            (U, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "o"}, A),
        ),
        (
            "chat",
            {"messages": [U, {"role": "assistant", "content": "", "function_call": {"name": "find", "arguments": '{"a": 1}'}}]},
            "messages",
            (U, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        ),
        (
            "chat",
            {"messages": [U, {"role": "assistant", "tool_calls": [{"id": "c", "name": "find", "arguments": ""}]}]},
            "messages",
            (
                U,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "find", "arguments": {}}}],
                },
            ),
        ),
        ("chat", {"messages": [U], "tools": [TOOL]}, "tools", (TOOL,)),
        ("chat", {"messages": [U], "tools": json.dumps([TOOL])}, "tools", (TOOL,)),
        ("chat", {"messages": [U], "functions": [TOOL["function"]]}, "tools", (TOOL,)),
        ("chat", {"messages": [U], "tools": None}, "tools", ()),
        ("chat", {"prompt": "hi", "completion": "ho"}, "messages", (U, A)),
        ("chat", {"prompt": [U, A, U], "completion": [A]}, "messages", (U, {**A, "weight": 0}, U, A)),
        ("chat", {"instruction": "hi", "input": "", "output": "ho"}, "messages", (U, A)),
        (
            "chat",
            {"instruction": "do", "input": "x", "output": "ho", "system": "s", "history": [["hi", "ho"]]},
            "messages",
            ({"role": "system", "content": "s"}, U, A, {"role": "user", "content": "do\nx"}, A),
        ),
    ],
)
def test_good_rows(task: Task, values: dict[str, Any], part: str, expected: Any) -> None:
    example = read(task, values)
    assert isinstance(example, Example), example
    assert getattr(example, part) == expected
    assert example.place == "f.jsonl:7"


@pytest.mark.parametrize(
    ("task", "values", "reason", "detail"),
    [
        (
            "completion",
            {"question": "q", "answer": "a"},
            "no column 'prompt' and 'completion'",
            "it has answer, question; did you mean data.columns: {prompt: question, completion: answer}?",
        ),
        ("completion", {"Prompt": "q", "completion": "a"}, "no column 'prompt'", "data.columns: {prompt: Prompt}?"),
        ("completion", {}, "no column 'prompt' and 'completion'", "it has none"),
        ("completion", {"messages": [U, A]}, "no column", "such rows are chats: set task: chat"),
        ("completion", {"prompt": "p", "completion": None}, "column 'completion' holds nothing (null), expected text", ""),
        ("completion", {"prompt": "p", "completion": ["c"]}, "column 'completion' holds a list, expected text", ""),
        ("completion", {"prompt": "p", "completion": {"0": "c"}}, "holds an object, expected text", "orient='records'"),
        ("completion", {"train": [], "test": []}, "no column", "write each into its own file"),
        ("completion", {"prompt": ["a", "b"], "completion": ["c", "d"]}, "column 'prompt' holds a list", "orient='records'"),
        ("completion", {"prompt": [U], "completion": [A]}, "column 'prompt' holds a list", "set task: chat"),
        ("completion", {"columns": ["prompt"], "index": [0], "data": [["a"]]}, "no column", "orient='records'"),
        ("completion", {str(n): {"prompt": "a"} for n in range(90)}, "no column", " and 75 more; a table as pandas writes it?"),
        ("completion", {" prompt": "a", "completion": "b"}, "no column 'prompt'", "data.columns: {prompt: ' prompt'}?"),
        ("completion", {"instruction": "i", "output": "o", "input": ["x"]}, "column 'input' holds a list", ""),
        ("completion", {"prompt": "p", "completion": float("nan")}, "column 'completion' holds NaN", ""),
        ("completion", {"prompt": "p", "completion": "x\ud800"}, "half of a surrogate pair", "\\ud800"),
        ("completion", {"prompt": "p", "completion": Unreadable("date32[day]", "")}, "holds a value of type date32[day]", ""),
        ("completion", {"instruction": "i", "output": "o", "history": [["a", "b"]]}, "set task: chat", ""),
        ("text", {"text": "  \n"}, "column 'text' is empty (white space only)", ""),
        ("classify", {"text": "t", "label": ""}, "column 'label' is empty", ""),
        ("classify", {"text": "t", "label": None}, "column 'label' holds nothing", ""),
        ("classify", {"text": "t", "label": 0.5}, "holds a number that is not whole, expected a class", ""),
        ("classify", {"text": "t", "label": ["a", "b"]}, "several labels per row are not supported", ""),
        ("chat", {"messages": "[{'role': 'user'}]"}, "holds text that is not a JSON list of turns", "Python's repr?"),
        ("chat", {"messages": [{"role": "user", "parts": []}]}, "a turn has no content", "turn 1: it has role, parts"),
        ("chat", {"messages": []}, "holds an empty list, expected a list of turns", ""),
        ("chat", {"messages": "hi"}, "holds text that is not a JSON list of turns", ""),
        ("chat", {"messages": ["hi"]}, "a turn is a value of type str", "turn 1"),
        (
            "chat",
            {"messages": [{"role": "narrator", "content": "x"}]},
            "a turn has an unknown role, expected",
            "turn 1: 'narrator'",
        ),
        ("chat", {"messages": [U, {"role": "assistant"}]}, "a turn has no content", "turn 2"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'", "turn 1"),
        ("chat", {"messages": [U, {**A, "weight": 0.5}]}, "a weight that is neither 0 nor 1", "turn 2: 0.5"),
        (
            "chat",
            {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments are not a JSON object",
            "turn 2",
        ),
        ("chat", {"messages": [{**U, "tool_calls": [CALL]}]}, "a turn of the user has tool calls", "turn 1"),
        ("chat", {"messages": [U], "tools": "x"}, "column 'tools' holds text that is not a JSON list of tools", ""),
        ("chat", {"messages": [{"role": "system", "content": "a"}], "system": "b"}, "and so does the first turn", ""),
        ("chat", {"dialogue": []}, "no column 'messages'", "data.columns: {messages: dialogue}?"),
    ],
)
def test_bad_rows(task: Task, values: dict[str, Any], reason: str, detail: str) -> None:
    bad = read(task, values)
    assert isinstance(bad, BadRow)
    assert bad.place == "f.jsonl:7"
    assert reason in bad.reason
    assert detail in bad.detail


def test_alpaca_rows_are_joined_as_their_authors_do() -> None:
    """The two texts of PROMPT_DICT in Stanford Alpaca's train.py, and nothing between prompt and answer."""
    head = "Below is an instruction that describes a task"
    end = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    full = read("completion", {"instruction": "Add.", "input": "1 2", "output": 3})
    bare = read("completion", {"instruction": "Add.", "input": None, "output": "3"})
    assert isinstance(full, Example)
    assert isinstance(bare, Example)
    assert full.prompt == f"{head}, paired with an input that provides further context. {end}### Input:\n1 2\n\n### Response:"
    assert bare.prompt == f"{head}. {end}### Response:"
    assert (full.completion, full.separator) == ("3", "")
    assert ALPACA_WITH_INPUT != ALPACA_WITHOUT_INPUT


def test_templates_join_columns() -> None:
    row = {"instruction": "i", "input": "", "output": "o", "question": "q", "context": None}
    mine = {"template": "{{Do}} {instruction}|{input}", "template_without_input": "Only {instruction}"}
    assert read("completion", row, **mine).prompt == "Only i"  # type: ignore[union-attr]
    assert read("completion", {**row, "input": "x"}, **mine).prompt == "{Do} i|x"  # type: ignore[union-attr]
    columns = {"completion": "output"}
    assert read("completion", row, template="{question}\n{context}", columns=columns).prompt == "q\n"  # type: ignore[union-attr]
    pair = {"premise": "a", "hypothesis": "b", "label": "x"}
    assert read("classify", pair, template="{premise} / {hypothesis}").text == "a / b"  # type: ignore[union-attr]
    assert "no column 'missing'" in read("completion", row, template="{missing}", columns=columns).reason  # type: ignore[union-attr]


def test_columns_are_renamed_by_part_and_formats_by_name() -> None:
    columns = {"prompt": "messages", "completion": "label"}
    example = read("completion", {"messages": "p", "label": "c"}, columns=columns)
    assert isinstance(example, Example)
    assert (example.prompt, example.completion) == ("p", "c")
    renamed = {"prompt": "task", "input": "about", "completion": "answer"}
    alpaca = read("chat", {"task": "t", "about": "x", "answer": "a"}, format="alpaca", columns=renamed)
    assert alpaca.messages[0]["content"] == "t\nx"  # type: ignore[union-attr,index]
    both = {"messages": [U, A], "prompt": "p", "completion": "c"}
    assert read("chat", both).messages == (U, A)  # type: ignore[union-attr]
    assert read("chat", both, format="prompt_completion").messages[0]["content"] == "p"  # type: ignore[union-attr,index]


def test_nulls_of_parquet_stand_for_keys_that_are_not_there() -> None:
    turn = {"role": "assistant", "content": None, "name": None, "weight": None}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    values = {"messages": [{**U, "tool_calls": None}, {**turn, "tool_calls": [call]}], "tools": [{**TOOL, "strict": None}]}
    example = reader("chat").read(Row(values, "f.parquet", 1, has_absent_as_null=True))
    assert isinstance(example, Example)
    assert example.messages is not None
    assert example.messages[0] == U
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert example.tools == (TOOL,)


def test_what_is_not_read_is_noted() -> None:
    rows = reader("chat")
    rows.read(Row({"messages": [{**U, "id": 3, "refusal": None}, {**A, "content": " "}], "extra": 1}, "f.jsonl", 7))
    assert rows.notes.unread_keys == {"id": ["f.jsonl:7"]}
    assert rows.notes.empty_answers == ["f.jsonl:7"]
    assert rows.unread_columns() == {"extra"}
    tables = reader("completion")
    assert tables.choose_columns(["id", "completion", "prompt", "far"]) == ["completion", "prompt"]
    tables.read(Row({"completion": "c", "prompt": "p"}, "f.parquet", 1))
    assert tables.unread_columns() == {"far", "id"}


def test_an_empty_answer_is_not_learned() -> None:
    example = read("chat", {"messages": [U, {**A, "content": ""}, U, A]})
    assert isinstance(example, Example)
    assert [turn.get("weight") for turn in example.messages or ()] == [None, 0, None, None]


def test_the_retention_set_may_keep_the_usual_name_and_train_may_not() -> None:
    columns = {"text": "body"}
    assert isinstance(read("text", {"text": "t"}, columns=columns), BadRow)
    assert isinstance(read("text", {"text": "t"}, "retain", columns=columns), Example)
    assert isinstance(reader("text", columns=columns).read(Row({"text": "t"}, "a.txt", 1, is_document=True)), Example)
    bad = reader("completion").read(Row({"text": "t"}, "a.txt", 1, is_document=True))
    assert isinstance(bad, BadRow)
    assert "a text file has no columns" in bad.reason


@pytest.mark.parametrize(
    ("values", "task"),
    [
        ({"text": "t", "prompt": "p", "completion": "c"}, "text"),
        ({"question": "p", "answer": "c"}, "completion"),
        ({"prompt": "p", "completion": "c"}, "completion"),
        ({"instruction": "p", "output": "c"}, "completion"),
        ({"messages": [{"role": "user", "content": "u"}]}, "chat"),
        ({"conversations": [{"from": "human", "value": "u"}]}, "chat"),
    ],
)
def test_a_retention_row_is_text_or_has_answers(values: dict[str, Any], task: str) -> None:
    example = read("classify", values, "retain", columns={"prompt": "question", "completion": "answer"})
    assert isinstance(example, Example)
    assert example.retention_task == task


def test_a_retention_row_with_neither_says_what_it_has() -> None:
    bad = read("completion", {"prompt": "p", "body": "b"}, "retain")
    assert isinstance(bad, BadRow)
    assert bad.reason == "no column 'text', nor prompt and completion, nor messages"
    assert bad.detail == "it has body, prompt"


def test_equal_content_has_an_equal_key_whatever_else_the_row_holds() -> None:
    key = lambda **values: read("completion", values).content_key  # type: ignore[union-attr] # noqa: E731
    assert key(prompt="p", completion="c", id=1) == key(completion="c", prompt="p", id=2)
    assert key(prompt="p", completion="c") != key(prompt="p", completion="d")
    assert key(prompt="p", completion="1") == key(prompt="p", completion=1)
    chat = lambda **values: read("chat", {"messages": [U, A], **values}).content_key  # type: ignore[union-attr] # noqa: E731
    assert chat() == chat(tools=[]) != chat(tools=[TOOL])


@pytest.mark.parametrize("value", ["", 'a "quoted" \\ path', "\u00e9\u2028\n\t\x00\x7f", "\U0001f600"])
def test_the_key_is_the_hash_of_the_content_as_json(value: str) -> None:
    for payload in ({"text": value}, {"prompt": value, "completion": value}, {"messages": ({"role": "user", "content": value},)}):
        text = json.dumps(payload, sort_keys=True, ensure_ascii=False)
        assert content_key(payload) == hashlib.sha256(text.encode()).hexdigest()


def test_a_group_is_a_column_that_train_must_have_and_may_be_empty() -> None:
    group = lambda value, split="train": read("text", {"text": "t", "user": value}, split, group="user").group  # type: ignore[union-attr] # noqa: E731
    assert group(3) == group(3.0) == group("3") == "group/3"
    assert group("x", "eval") == "group/x"
    assert group(None) is group("") is group(" ") is group(float("nan")) is None
    missing = read("text", {"text": "t"}, group="user")
    assert isinstance(missing, BadRow)
    assert missing.reason == "no column 'user', which data.group names"
    assert isinstance(read("text", {"text": "t"}, "eval", group="user"), Example)
