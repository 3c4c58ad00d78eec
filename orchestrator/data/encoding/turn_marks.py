"""Marks that locate turns in a rendered chat: private-use characters put around each turn's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestrator.data.encoding.control_tokens import PRIVATE_USE, REASONING

Turn = Mapping[str, Any]
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
OPENING_TAG = re.compile(r"[<\[][^<>\[\]\s]*[>\]]\s*")


class Marks(NamedTuple):
    """Characters around the text of one turn."""

    opening: str
    closing: str
    call: str
    """Precedes the names of its tool calls."""


@dataclass
class Marked:
    """Rendering without its marks, and their positions."""

    text: str
    places: dict[str, list[int]] = field(default_factory=dict)
    """Mark -> its character positions in `text`, ascending."""

    def first(self, mark: str) -> int | None:
        return next(iter(self.places.get(mark, ())), None)

    def last(self, mark: str) -> int | None:
        return next(reversed(self.places.get(mark, ())), None)


class TurnMarks:
    """Marks for every turn of one chat; none of them occurs in its rendering.

    Args:
        turns: The chat.
        text: Its rendering.
    """

    def __init__(self, turns: Sequence[Turn], text: str) -> None:
        size = 3 * len(turns)
        start = PRIVATE_USE.start
        # Nearly no text has private-use characters; only then a free block is searched.
        if text and ord(max(text)) >= start:
            taken = {ord(char) for char in text if ord(char) >= start}
            blocks = range(start, PRIVATE_USE.stop - size, size)
            start = next(block for block in blocks if taken.isdisjoint(range(block, block + size)))
        self._turns = turns
        self.of = [Marks(*map(chr, range(first, first + 3))) for first in range(start, start + size, 3)]
        self._find = re.compile(f"[{chr(start)}-{chr(start + size - 1)}]")

    def marked(self, only: Callable[[Turn], bool] = lambda turn: True) -> list[Turn]:
        """Return the turns with marks around contents and reasoning, and around the names of the functions called."""
        return [_marked(turn, marks) if only(turn) else turn for turn, marks in zip(self._turns, self.of, strict=True)]

    def found_in(self, rendering: str) -> Marked:
        places: dict[str, list[int]] = {}
        pieces: list[str] = []
        before = 0
        for taken_out, found in enumerate(self._find.finditer(rendering)):
            # Positions in the text without marks: one character less for each mark before.
            places.setdefault(found[0], []).append(found.start() - taken_out)
            pieces.append(rendering[before : found.start()])
            before = found.end()
        return Marked("".join([*pieces, rendering[before:]]), places)


def said(turn: Turn) -> str:
    """Return the text of a turn's content; parts of a list are concatenated."""
    content = turn.get("content")
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or () if isinstance(part, dict))


def reasoning_of(turn: Turn) -> str:
    return next((turn[key] for key in REASONING_KEYS if isinstance(turn.get(key), str)), "")


def calls_of(turn: Turn) -> list[dict[str, Any]]:
    """Return the functions that a turn calls."""
    found = [call.get("function", call) for call in turn.get("tool_calls") or () if isinstance(call, dict)]
    return [call for call in found if isinstance(call, dict)]


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with `change` applied to every string; keys are kept."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(inner, change) for key, inner in value.items()}
    return [mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string of a JSON value except keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_of(inner)


def common_prefix(first: str, second: str) -> int:
    """Return the number of leading characters that two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _marked(turn: Turn, marks: Marks) -> Turn:
    around = lambda text: _around(text, marks)  # noqa: E731
    changed = dict(turn)
    for key in REASONING_KEYS:
        if isinstance(turn.get(key), str):
            changed[key] = around(turn[key])
    content = turn.get("content")
    if isinstance(content, str):
        changed["content"] = around(content)
    elif isinstance(content, list | tuple):
        changed["content"] = [
            {**part, "text": around(part["text"])} if isinstance(part, dict) and isinstance(part.get("text"), str) else part
            for part in content
        ]
    if turn.get("tool_calls"):
        changed["tool_calls"] = [_marked_call(call, marks) for call in turn["tool_calls"]]
    return changed


def _marked_call(call: Any, marks: Marks) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _marked_call(call["function"], marks)}
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        return {**call, "name": f"{marks.call}{marks.opening}{call['name']}{marks.closing}"}
    return call


def _around(text: str, marks: Marks) -> str:
    """Put marks around a text, inside white space and an opening tag of reasoning: templates look for both."""
    core = text.strip()
    if not core:
        return text
    before = len(text) - len(text.lstrip())
    head, tail = text[:before], text[before + len(core) :]
    tag = OPENING_TAG.match(core)
    # Templates recognise reasoning by an opening tag at the very beginning of the content.
    if tag and REASONING.fullmatch(tag[0].strip()) and tag.end() < len(core):
        head, core = head + tag[0], core[tag.end() :]
    return f"{head}{marks.opening}{core}{marks.closing}{tail}"
