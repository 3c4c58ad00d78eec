"""Supervision of chats: the assistant's turns, located in the rendered chat.

A turn begins where the generation prompt ends: where the rendering of all turns before it, with the prompt for an answer, and
the rendering of the whole chat diverge. So what a template puts before the content (an empty block of reasoning) is trained
on, since the model has to write it. A turn ends with the first token that closes it. The template may be irregular otherwise:
it may render a turn differently once another one follows, as those of reasoning models do.

`{% generation %}` marks of the template take precedence: they say where its turns are, less the generation prompt, and with
the closing token if the marks leave it out.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.data.encoding.chat_template import ChatTemplate, Tools
from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.row_notices import RowNotices
from orchestrator.data.encoding.spans import Found, NotRenderedError, Span, SpanFinder
from orchestrator.data.encoding.turn_marks import Turn, calls_of, mapped, reasoning_of, said, strings_of
from orchestrator.data.reading.examples import Example
from orchestrator.data.reading.row import BadRow
from orchestrator.spec.models import DataSpec

MAX_REMEMBERED = 256
"""Number of role sequences that are remembered."""


@dataclass(frozen=True)
class RenderedChat:
    """Chat as the template renders it."""

    example: Example
    text: str
    spans: tuple[Span, ...]
    """Supervised turns, in order."""
    escaped: bool
    """True if `text` has stand-ins for control tokens spelled in the row."""


class ChatEncoder:
    """Tokenizes chats with one tokenizer.

    Args:
        tokenizer: Has a chat template.
        data: `train_on` and `special_tokens_in_text`.
        ends: Texts of the tokens at which the base stops as it is.
        noticed: Gets what is worth telling.
    """

    def __init__(self, tokenizer: Any, data: DataSpec, ends: Sequence[str], noticed: RowNotices) -> None:
        self._data = data
        self._noticed = noticed
        self._template = ChatTemplate(tokenizer)
        style = self._template.style(ControlTokens(tokenizer))
        self.control = ControlTokens(tokenizer, style.headers)
        self._unasked = style.unasked
        self._finder = SpanFinder(self._template, self.control, style, ends)
        closings = [style.closing] if style.closing else []
        self._ends = tuple(dict.fromkeys([*closings, *ends]))
        self._renders_tools = False
        self._shown: set[tuple[str, ...]] = set()
        """Role sequences that the template renders completely."""

    def render(self, example: Example) -> RenderedChat | BadRow:
        """Return the chat and the spans of its supervised turns; a BadRow if the template rejects it."""
        from jinja2 import TemplateError

        try:
            return self._rendered(example)
        except NotRenderedError as error:
            return BadRow(example.file, example.line, str(error))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            return BadRow(example.file, example.line, f"the chat template rejects it: {error}")

    def encode(self, chats: Sequence[RenderedChat]) -> list[tuple[list[int], list[bool]]]:
        """Return (token ids, whether each is supervised) of each chat; the ids are the tokenizer's for the whole text."""
        found: dict[int, tuple[list[int], list[bool]]] = {}
        for escaped in (False, True):
            # Few chats spell control tokens; all others are tokenized in one batch by the unchanged tokenizer.
            chosen = [index for index, chat in enumerate(chats) if chat.escaped == escaped]
            if not chosen:
                continue
            texts = [self._respelled(chats[index]) if escaped else _as_it_is(chats[index]) for index in chosen]
            backend = self.control.plain if escaped else self.control.exact
            encoded = backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
            for index, (text, spans), one in zip(chosen, texts, encoded, strict=True):
                found[index] = one.ids, _supervised(text, one.offsets, spans)
        return [found[index] for index in range(len(chats))]

    def prompt_and_answer(self, chat: RenderedChat) -> tuple[str, str]:
        """Return the text before the last supervised turn, and that turn without its closing token."""
        if not chat.spans:
            return "", ""
        last = chat.spans[-1]
        prompt, answer = chat.text[: last.start], chat.text[last.start : last.answer_end]
        return (self.control.literal(prompt), self.control.literal(answer)) if chat.escaped else (prompt, answer)

    def _respelled(self, chat: RenderedChat) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendering as the tokenizer without control tokens reads it, and its spans there."""
        # Respelling changes lengths, so the text is cut at the spans' edges and the new positions are summed up.
        edges = [0, *(edge for span in chat.spans for edge in span[:2]), len(chat.text)]
        pieces = [self.control.spelled(chat.text[start:end]) for start, end in itertools.pairwise(edges)]
        places = [0, *itertools.accumulate(map(len, pieces))]
        return "".join(pieces), [(places[2 * index + 1], places[2 * index + 2]) for index in range(len(chat.spans))]

    def _rendered(self, example: Example) -> RenderedChat:
        turns, tools, escaped = self._escaped(example)
        text, marked = self._template.render_with_marks(turns, tools)
        if tools and not self._shows_tools(turns, tools, text):
            self._noticed.add("tools", example.place)
        if self._unasked:
            self._noticed.add("header", example.place, self._unasked)
        answers = [index for index, turn in enumerate(turns) if _answers(turn)]
        wanted = self._wanted(example)
        # Marks rarely include tool calls or reasoning, which the model has to write too: such chats are located by rendering.
        by_marks = 0 < len(marked) == len(answers) and not any(
            calls_of(turns[index]) or reasoning_of(turns[index]) for index in answers
        )
        found: dict[int, Found] = {}
        if wanted and not by_marks:
            found = self._finder.find(turns, tools, text, wanted)
            self._note_missing_parts(example, wanted, found, last=max(answers))
        elif wanted:
            self._note_omissions(example, turns, tools, text, wanted)
        if by_marks:
            # A closing token after the mark counts only up to the next answer.
            limits = [*(start for start, _ in marked[1:]), len(text)]
            each = zip(answers, marked, limits, strict=True)
            spans = [self._finder.checked(text, *span, limit) for index, span, limit in each if index in wanted]
        else:
            spans = [_narrowed(found[index].span, marked) for index in sorted(found)]
        return RenderedChat(example, text, tuple(spans), escaped)

    def _wanted(self, example: Example) -> set[int]:
        """Return the assistant's turns to train on: not empty, `weight` not 0, and only the last one if `train_on` says so."""
        chosen = [
            index
            for index, turn in enumerate(example.messages or ())
            if _answers(turn) and turn.get("weight") != 0 and (said(turn).strip() or reasoning_of(turn) or calls_of(turn))
        ]
        return set(chosen[-1:] if self._data.train_on == "last_assistant" else chosen)

    def _shows_tools(self, turns: Sequence[Turn], tools: Tools, text: str) -> bool:
        """Return True if the template renders tools; a positive result is cached."""
        self._renders_tools = self._renders_tools or self._template.render(turns) != text
        return self._renders_tools

    def _note_omissions(self, example: Example, turns: Sequence[Turn], tools: Tools, text: str, wanted: set[int]) -> None:
        """Note what a template with marks leaves out; checked once for each role sequence that it renders completely."""
        roles = tuple(turn["role"] for turn in turns)
        if roles in self._shown:
            return
        with suppress(NotRenderedError):
            if not self._note_missing_parts(example, wanted, self._finder.find(turns, tools, text, wanted), last=max(wanted)):
                return
        if len(self._shown) < MAX_REMEMBERED:
            self._shown.add(roles)

    def _note_missing_parts(self, example: Example, wanted: set[int], found: dict[int, Found], last: int) -> bool:
        """Note what the template leaves out; return False if it leaves out anything."""
        turns = list(found.values())
        final = [found[last]] if last in found else []
        missing = {
            "unrendered": len(found) < len(wanted),
            "unread": any(not turn.has_context for turn in turns),
            "beside": any(not turn.has_text for turn in turns),
            "reasoning": any(not turn.has_reasoning for turn in final),
            "prompt": any(turn.unasked.strip() for turn in final),
        }
        for kind in (kind for kind, is_so in missing.items() if is_so):
            self._noticed.add(kind, example.place, *(turn.unasked for turn in final if kind == "prompt"))
        return not any(missing.values())

    def _escaped(self, example: Example) -> tuple[list[Turn], list[dict[str, Any]], bool]:
        """Return turns and tools with stand-ins for the control tokens that they spell, and whether there are any.

        End tokens at the end of an answer are removed, since the template writes one.
        """
        # `weight` selects what is trained on; it is not part of the chat.
        turns: list[Turn] = [{key: value for key, value in turn.items() if key != "weight"} for turn in example.messages or ()]
        tools = list(example.tools)
        if not any(self.control.pattern.search(text) for text in strings_of([turns, tools])):
            return turns, tools, False
        # Removed also with `allow`: the template writes an end token itself, so a second one would be trained on.
        turns = [self._without_end(turn, example.place) for turn in turns]
        if self._data.special_tokens_in_text == "allow":
            held = [token for text in strings_of([turns, tools]) for token in self.control.held_by(text)]
            if held:
                self._noticed.add("allowed", example.place, *held)
            return turns, tools, False
        turns = [mapped(turn, self.control.stand_in_answer if _answers(turn) else self.control.stand_in) for turn in turns]
        tools = [mapped(tool, self.control.stand_in) for tool in tools]
        held = [token for text in strings_of([turns, tools]) for token in self.control.stood_for(text)]
        if held:
            self._noticed.add("escaped", example.place, *held)
        return turns, tools, bool(held)

    def _without_end(self, turn: Turn, place: str) -> Turn:
        content = turn.get("content")
        if not _answers(turn) or not isinstance(content, str):
            return turn
        content, taken = self.control.without_ends(content, self._ends)
        if taken:
            self._noticed.add("ended", place, *taken)
        return {**turn, "content": content}


def _answers(turn: Turn) -> bool:
    return turn["role"] == "assistant"


def _as_it_is(chat: RenderedChat) -> tuple[str, list[tuple[int, int]]]:
    return chat.text, [(span.start, span.end) for span in chat.spans]


def _narrowed(span: Span, marked: Sequence[tuple[int, int]]) -> Span:
    """Return a turn from where the template's marks within it begin, if it has any."""
    starts = [start for start, end in marked if start < span.end and end > span.start]
    return span._replace(start=max(span.start, min(starts))) if starts else span


def _supervised(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each token whether it begins in one of the spans.

    A token that begins before a span and reaches into it counts if only white space precedes the span.
    """
    starts = [start for start, _ in offsets]
    mask = [False] * len(offsets)
    for start, end in spans:
        # Bisection: a linear scan per span is quadratic in long chats.
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        while first and offsets[first - 1][1] > start and text[starts[first - 1] : start].isspace():
            first -= 1
        mask[first:last] = [True] * (last - first)
    return mask
