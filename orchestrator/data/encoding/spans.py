"""Locate the characters of a rendered chat that the model has to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.data.encoding.chat_template import ChatTemplate, Style, Tools, snapped
from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.turn_marks import Marked, Turn, TurnMarks, calls_of, common_prefix, reasoning_of, said


class Span(NamedTuple):
    """Characters of a rendering, from the end of the generation prompt."""

    start: int
    end: int
    """End, including the closing token if there is one."""
    answer_end: int
    """End, excluding the closing token."""


class Found(NamedTuple):
    """One assistant turn in the rendering of its chat."""

    span: Span
    unasked: str = ""
    """Text at the end of the generation prompt that the turn does not begin with."""
    has_text: bool = True
    has_reasoning: bool = True
    has_context: bool = True
    """True if every earlier turn with text is rendered."""


class NotRenderedError(ValueError):
    """The template leaves out a turn to train on, or renders it so that it cannot be located."""


class SpanFinder:
    """Locates turns in renderings of one template.

    Args:
        ends: Texts of the tokens at which the base stops as it is.
    """

    def __init__(self, template: ChatTemplate, control: ControlTokens, style: Style, ends: Sequence[str]) -> None:
        self._template = template
        self._control = control
        self._style = style
        self._ends = frozenset(ends)

    def checked(self, text: str, start: int, end: int, limit: int) -> Span:
        """Return the marked turn without the generation prompt, up to the closing token within or after it.

        Args:
            limit: Where the next turn of the assistant begins.
        """
        prompt = self._style.generation_prompt
        shared = common_prefix(prompt, text[start:end])
        # Part of a generation prompt counts only if it contains a control token: a few equal characters may be coincidence.
        if shared and (shared == len(prompt) or self._control.pattern.search(text, start, start + shared)):
            start = snapped(text, start + shared, self._control)
        closing = None
        for found in reversed(list(self._control.pattern.finditer(text, start, end))):
            if text[found.end() : closing.start() if closing else end].strip():
                break
            if closing is None or found[0] == self._style.closing:
                closing = found
        if closing is not None:
            return Span(start, closing.end(), closing.start())
        after = self._closing(text, end, limit)
        if after is not None and not text[end : after[0]].strip():
            return Span(start, after[1], after[0])
        return Span(start, end, end)

    def find(self, turns: Sequence[Turn], tools: Tools, text: str, wanted: set[int]) -> dict[int, Found]:
        """Locate the requested turns that the template renders.

        Args:
            text: The rendering of all turns.

        Raises:
            NotRenderedError: a tool call is left out, or turns are written so that they cannot be found.
        """
        marks = TurnMarks(turns, text)
        # Some templates rewrite or check the text of user or system turns, so marks there change the rendering: then only answers
        # are marked.
        for only_answers in (False, True):
            given = marks.marked(lambda turn, only=only_answers: not only or turn["role"] == "assistant")
            whole = marks.found_in(self._template.render(given, tools))
            # The marks must not have changed the rendering otherwise.
            if whole.text == text and whole.places:
                chat = _Chat(turns, tools, given, marks, whole, all_marked=not only_answers)
                found = {index: self._found(chat, index) for index in sorted(wanted)}
                return {index: turn for index, turn in found.items() if turn is not None}
        return {index: self._by_prefixes(turns, tools, text, index) for index in sorted(wanted)}

    def _found(self, chat: _Chat, index: int) -> Found | None:
        turn, marks, whole = chat.turns[index], chat.marks.of[index], chat.whole
        if calls_of(turn) and whole.first(marks.call) is None:
            raise NotRenderedError(
                "the chat template leaves out the tool calls of an assistant's turn: take a base whose chat template renders"
                " them, or write them into the content"
            )
        opening, closing = whole.first(marks.opening), whole.last(marks.closing)
        if opening is None and closing is None:
            return None
        said_here = closing if closing is not None else opening
        assert said_here is not None
        later = [place for other in chat.marks.of[index + 1 :] for mark in other for place in whole.places.get(mark, ())]
        # A closing token after the next turn's text belongs to that turn.
        limit = min((place for place in later if place >= said_here), default=len(whole.text))
        start, unasked = self._start(chat, index, opening if opening is not None else said_here)
        after = max(said_here, start)
        ending = self._closing(whole.text, after, limit)
        if ending is None:
            end = self._unclosed(chat, index, after, limit)
            ending = (end, end)
        places = whole.places.get(marks.opening, ())
        parts = bool(said(turn).strip()) + bool(reasoning_of(turn).strip()) + len(calls_of(turn))
        return Found(
            Span(start, ending[1], ending[0]),
            # Templates may render earlier turns without the reasoning block that the generation prompt adds; only the last is
            # comparable.
            unasked if index == len(chat.turns) - 1 else "",
            # Text, reasoning and each call have a mark; fewer marks mean that one of them was left out.
            has_text=len(places) >= parts or not calls_of(turn),
            has_reasoning=opening is not None and (len(places) >= parts or not reasoning_of(turn).strip()),
            has_context=not chat.all_marked or all(map(chat.shows, range(index))),
        )

    def _start(self, chat: _Chat, index: int, opening: int) -> tuple[int, str]:
        """Return (end of the generation prompt, the part of it that is missing there)."""
        whole = chat.whole
        earlier = [other.closing for other in chat.marks.of[:index]]
        # The last earlier text before this turn: everything after it is the template's own.
        anchor = max((place for mark in earlier for place in whole.places.get(mark, ()) if place <= opening), default=0)
        mark = next((mark for mark in earlier if anchor and anchor in whole.places.get(mark, ())), None)
        between = whole.text[anchor:opening]
        prompt = self._prompt(chat, index)
        place = prompt.last(mark) if prompt is not None and mark is not None else 0 if mark is None else None
        if prompt is not None and place is not None and index:
            asked = prompt.text[place:]
            shared = common_prefix(asked, between)
            if shared == len(asked) and shared:
                return anchor + shared, ""
            header = self._style.generation_prompt.strip()
            # The prompt's beginning matches, and the usual header does not occur later: the turn begins where they diverge.
            if shared and not (header and header in between):
                return snapped(whole.text, anchor + shared, self._control), asked[shared:]
        # The template renders this turn differently from its prompt: search for the usual header instead.
        for header in (self._style.generation_prompt, self._style.generation_prompt.strip()):
            if header and header in between:
                return anchor + between.rindex(header) + len(header), ""
        header = self._style.generation_prompt
        # The template may write only the beginning of its generation prompt before an earlier turn.
        shared = next((size for size in range(len(header), 0, -1) if between.endswith(header[:size])), 0)
        return (anchor + len(between), header[shared:]) if shared else (opening, "")

    def _prompt(self, chat: _Chat, index: int) -> Marked | None:
        """Return the rendering that requests a turn; None if the template cannot render the earlier turns alone."""
        from jinja2 import TemplateError

        if not index:
            return None
        try:
            return chat.marks.found_in(self._template.render(chat.given[:index], chat.tools, asks=True))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            return None

    def _closing(self, text: str, start: int, limit: int) -> tuple[int, int] | None:
        """Return (start, end) of the token that closes the turn whose text ends at `start`."""
        usual = self._style.closing
        if usual and (place := text.find(usual, start, limit)) >= 0:
            return place, place + len(usual)
        found = self._control.pattern.search(text, start, limit)
        # Another control token closes the turn only if it is known to, or if the chat ends with it; it may also open the next
        # turn.
        if found and (found[0] in self._ends or found[0] in self._style.between or limit == len(text)):
            return found.span()
        return None

    def _unclosed(self, chat: _Chat, index: int, start: int, limit: int) -> int:
        """Return where a turn without a closing token ends: after its own white space, or after its tool calls."""
        turn, after = chat.turns[index], chat.whole.text[start:limit]
        if not calls_of(turn):
            # White space that the row itself ends with is part of the answer; what the template adds is not.
            words = said(turn)
            return start + common_prefix(after, words[len(words.rstrip()) :])
        if limit < len(chat.whole.text):
            alone = chat.marks.found_in(self._template.render(chat.given[: index + 1], chat.tools))
            place = alone.last(chat.marks.of[index].closing)
            after = after[: common_prefix(after, alone.text[place:])] if place is not None else after
        return start + len(after.rstrip())

    def _by_prefixes(self, turns: Sequence[Turn], tools: Tools, text: str, index: int) -> Found:
        """Locate a turn between the rendering that requests it and the one that contains it, if both are prefixes of the whole
        rendering."""
        before = self._template.render(turns[:index], tools, asks=True) if index else ""
        after = self._template.render(turns[: index + 1], tools)
        if not index or not after.startswith(before) or not text.startswith(after):
            raise NotRenderedError(
                "an assistant's turn cannot be found in what the chat template renders: put {% generation %} and"
                " {% endgeneration %} around the assistant's content in the template"
            )
        return Found(self.checked(text, len(before), len(after), len(after)))


class _Chat(NamedTuple):
    """Chat, its marked turns, and their rendering."""

    turns: Sequence[Turn]
    tools: Tools
    given: Sequence[Turn]
    marks: TurnMarks
    whole: Marked
    all_marked: bool
    """True if the turns between the answers are marked too."""

    def shows(self, index: int) -> bool:
        """Return True if a turn other than an answer is rendered, or has no text."""
        turn = self.turns[index]
        return turn["role"] == "assistant" or not said(turn).strip() or self.whole.first(self.marks.of[index].closing) is not None
