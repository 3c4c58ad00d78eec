"""Convert chat turns from the forms that users have to OpenAI's, which chat templates read.

Supported are OpenAI's own form (`role`, `content`, `tool_calls`, `tool_call_id`, `name`, `weight`, `reasoning_content`;
content as text, null or a list of text parts; the older `function_call` and role `function`) and ShareGPT's (`from`, `value`),
with the roles that LLaMA-Factory and axolotl document for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.data.reading.cells import kind_of, to_text
from orchestrator.data.reading.row import RowError
from orchestrator.units import printable, quoted

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Role for each name; the content of a `function_call` is a call, not text."""
CALLS = ("function_call", "tool_call")
READ_KEYS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "weight", "reasoning_content")
)
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the key that holds it."""
Turn = dict[str, Any]


@dataclass
class TurnNotes:
    """Observations on the turns of many rows."""

    unread_keys: dict[str, list[str]] = field(default_factory=dict)
    """Keys of turns that are ignored, with the places of their first rows."""
    empty_answers: list[str] = field(default_factory=list)
    """Places of rows with an empty assistant turn."""
    num_sharegpt: int = 0
    num_weights: int = 0


def read_turns(value: Any, name: str, place: str, notes: TurnNotes, *, absent_as_null: bool = False) -> tuple[Turn, ...]:
    """Return turns in OpenAI's form.

    Args:
        value: A list of turns, or its JSON.
        name: The column's.
        absent_as_null: Null in a nested value stands for a key that is not there, as in Parquet.

    Raises:
        RowError: it is none, or a turn cannot be read.
    """
    column = quoted(name)
    if isinstance(value, str):
        value = _from_json(value, f"column {column} holds text that is not a JSON list of turns")
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise RowError(f"column {column} holds {found}, expected a list of turns")
    turns = cast("list[Any]", value)
    if isinstance(turns[0], dict) and "from" in turns[0]:
        notes.num_sharegpt += 1
    return tuple(_turn(turn, index, place, notes, absent_as_null) for index, turn in enumerate(turns))


def _turn(value: Any, index: int, place: str, notes: TurnNotes, absent_as_null: bool) -> Turn:
    if not isinstance(value, dict):
        raise RowError(f"a turn is {kind_of(value)}, expected an object with role and content", f"turn {index + 1}")
    turn = cast("Turn", value)
    if absent_as_null:
        turn = {key: without_nulls(part) for key, part in turn.items() if part is not None}
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        expected = "expected system, user, assistant or tool under role, or ShareGPT's names for them under from"
        if said is None:
            raise RowError(f"a turn has no role, {expected}", f"turn {index + 1}")
        raise RowError(f"a turn has an unknown role, {expected}", f"turn {index + 1}: {printable(repr(said))[:60]}")
    for key in turn.keys() - READ_KEYS:
        if turn[key] is not None:
            notes.unread_keys.setdefault(str(key), []).append(place)
    try:
        return _filled(role, str(said), turn, place, notes)
    except RowError as problem:
        raise RowError(problem.reason, f"turn {index + 1}" + (f": {problem.detail}" if problem.detail else "")) from None


def _filled(role: str, said: str, turn: Turn, place: str, notes: TurnNotes) -> Turn:
    """Return the turn in OpenAI's form: role and content first, then the other keys."""
    raw = turn.get("content", turn.get("value"))
    calls = _tool_calls(turn)
    thoughts = ""
    if said.strip().lower() in CALLS:
        calls, content = [*calls, *_written_calls(raw)], None
    else:
        content, thoughts = _content(raw)
    if calls and role != "assistant":
        raise RowError(f"a turn of the {role} has tool calls, expected them in a turn of the assistant")
    if content is None and not calls:
        has = f"it has {printable(', '.join(map(str, turn)))[:80]}"
        raise RowError("a turn has no content", "its content is null, and it has no tool calls" if "content" in turn else has)
    if calls and not (content or "").strip():
        content = None
    result: Turn = {"role": role, "content": content}
    if calls:
        result["tool_calls"] = calls
    thoughts = to_text(turn["reasoning_content"], "reasoning_content") if turn.get("reasoning_content") else thoughts
    if thoughts:
        result["reasoning_content"] = thoughts
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            result[key] = to_text(turn[key], key)
    if role == "assistant":
        weight = _weight(turn.get("weight"), notes)
        if content is not None and not content.strip() and not calls and not thoughts:
            notes.empty_answers.append(place)
            weight = 0
        if weight is not None:
            result["weight"] = weight
    return result


def _weight(value: Any, notes: TurnNotes) -> int | None:
    if value is None:
        return None
    if value not in (0, 1) or isinstance(value, str):
        raise RowError("a turn has a weight that is neither 0 nor 1", printable(repr(value))[:40])
    notes.num_weights += 1
    return int(value)


def _content(value: Any) -> tuple[str | None, str]:
    """Return (text of a content, its thinking parts); text parts are concatenated."""
    if value is None:
        return None, ""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise RowError("a turn's content is an object, expected text or a list of text parts")
        return to_text(value, "content"), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in cast("list[Any]", value):
        if isinstance(part, str):
            texts.append(to_text(part, "content"))
            continue
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else type(part).__name__
        if kind == "thinking":
            thoughts.append(to_text(part.get("thinking"), "thinking"))
        elif kind in TEXT_PARTS:
            texts.append(to_text(part.get(TEXT_PARTS[kind]), f"{kind} part"))
        else:
            raise RowError(f"a turn's content has a part of type {printable(repr(kind))[:60]}: only text parts are read")
    return "".join(texts), "".join(thoughts)


def _tool_calls(turn: Turn) -> list[Turn]:
    """Return `tool_calls`, or the older `function_call`, with the arguments as objects."""
    value = turn.get("tool_calls") or []
    if isinstance(value, str):
        value = _from_json(value, "tool_calls is text that is not JSON")
    if not isinstance(value, list):
        raise RowError(f"tool_calls is {kind_of(value)}, expected a list")
    calls = [_call(entry) for entry in cast("list[Any]", value)]
    old = turn.get("function_call")
    return [*calls, _call(old)] if old else calls


def _written_calls(value: Any) -> list[Turn]:
    """Return the calls that a ShareGPT turn of `function_call` writes as JSON."""
    found = _from_json(value, "a function_call turn holds text that is not JSON") if isinstance(value, str) else value
    calls = cast("list[Any]", found) if isinstance(found, list) else [found]
    if not calls:
        raise RowError("a function_call turn holds no call")
    return [_call(entry) for entry in calls]


def _call(value: Any) -> Turn:
    expected = "expected a name and arguments"
    if not isinstance(value, dict):
        raise RowError(f"a tool call is {kind_of(value)}, {expected}")
    call = cast("Turn", value)
    inner = call.get("function", call)
    function = cast("Turn", inner) if isinstance(inner, dict) else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"a tool call has no name, {expected}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _from_json(arguments, "a tool call's arguments are not a JSON object") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError("a tool call's arguments are not a JSON object", kind_of(arguments))
    result: Turn = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": str(call["id"]), **result} if call.get("id") is not None else result


def read_tools(value: Any, name: str, *, absent_as_null: bool = False) -> tuple[Turn, ...]:
    """Return JSON Schemas of functions, each as `{type: function, function: ...}`; empty if there are none.

    Raises:
        RowError: the value is no list of such schemas.
    """
    column = quoted(name)
    if isinstance(value, str):
        value = _from_json(value, f"column {column} holds text that is not a JSON list of tools") if value.strip() else None
    if value is None or value == []:
        return ()
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"column {column} holds {kind_of(value)}, expected a list of tools")
    tools: list[Turn] = []
    for entry in cast("list[Any]", value):
        tool = without_nulls(entry) if absent_as_null else entry
        tool = _from_json(tool, f"column {column} holds a tool that is not JSON") if isinstance(tool, str) else tool
        if not isinstance(tool, dict) or not ("function" in tool or "name" in tool):
            raise RowError(f"column {column} holds a tool without a name, expected JSON Schemas of functions")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def without_nulls(value: Any) -> Any:
    """Remove keys that hold null from nested values: Parquet and Arrow write every key of a struct into every row."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in cast("Turn", value).items() if part is not None}
    return [without_nulls(part) for part in cast("list[Any]", value)] if isinstance(value, list) else value


def _from_json(text: str, problem: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        written_by_repr = text.lstrip().startswith(("[{'", "{'"))
        raise RowError(problem, "written by Python's repr? use json.dumps" if written_by_repr else "") from None
