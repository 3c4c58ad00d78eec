"""A tokenizer's chat template: how it renders a chat, and the text that it puts around turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.encoding.control_tokens import REASONING, ControlTokens
from orchestrator.data.encoding.turn_marks import Turn, TurnMarks, common_prefix

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION: Turn = {"role": "user", "content": "What is asked here"}
ANSWER: Turn = {"role": "assistant", "content": "What is answered here"}
"""Chat that is rendered to find the template's own text."""
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Style:
    """Text that a template writes around turns, found by rendering one question with one answer; empty if it rejects them."""

    generation_prompt: str = ""
    """Text that requests an answer, after a complete question."""
    closing: str | None = None
    """Control token after an answer."""
    between: tuple[str, ...] = ()
    """Control tokens that close a question."""
    unasked: str = ""
    """Text before an answer that the generation prompt does not contain: it is missing, or shorter. Tags of reasoning, which a
    model opens itself, do not count."""
    headers: tuple[str, ...] = ()
    """Added tokens that are not special but begin or end a turn."""


class ChatTemplate:
    """Renders chats with a tokenizer's template, which may raise anything that jinja2 does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._has_marks = bool(GENERATION_MARK.search(str(tokenizer.chat_template)))

    def render(self, turns: Sequence[Turn], tools: Tools = (), *, asks: bool = False) -> str:
        """Return the chat as text; with `asks`, up to where an answer is requested."""
        return self._tokenizer.apply_chat_template(
            list(turns), tools=list(tools) or None, tokenize=False, add_generation_prompt=asks
        )

    def render_with_marks(self, turns: Sequence[Turn], tools: Tools = ()) -> tuple[str, list[tuple[int, int]]]:
        """Return the chat as text, and the characters between the template's `{% generation %}` marks."""
        # Rendering with a mask is slower, and warns if the template has no marks.
        if not self._has_marks:
            return self.render(turns, tools), []
        from transformers.utils.chat_template_utils import render_jinja_template

        given: Any = list(tools) or None
        (text,), (spans,) = render_jinja_template(
            # Called directly, since apply_chat_template returns the mask only with token ids, not the spans in the text.
            conversations=[[{key: value for key, value in turn.items() if value is not None} for turn in turns]],
            tools=given,
            chat_template=self._tokenizer.get_chat_template(None, given),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return text, [(int(start), int(end)) for start, end in spans if end > start]

    def style(self, control: ControlTokens) -> Style:
        """Text that the template writes around a question and its answer."""
        from jinja2 import TemplateError

        marks = TurnMarks((QUESTION, ANSWER), "")
        asked, answered = marks.of
        turns = marks.marked()
        try:
            whole, prompt, question = (
                marks.found_in(text) for text in (self.render(turns), self.render(turns[:1], asks=True), self.render(turns[:1]))
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            return Style()
        # Three renderings locate the template's own text: whole chat, question with generation prompt, question alone.
        ends = [place.last(asked.closing) for place in (whole, prompt, question)]
        start, answer_end = whole.first(asked.opening), whole.first(answered.closing)
        if start is None or answer_end is None or None in ends:
            return Style()
        after_question, after_prompt, after_alone = (
            found.text[end:] for found, end in zip((whole, prompt, question), ends, strict=True)
        )
        # What follows a question in any case closes it; the rest is the generation prompt.
        shared = snapped(after_prompt, common_prefix(after_prompt, after_alone), control)
        between = whole.text[ends[0] : whole.first(answered.opening)]
        header = whole.text[:start] + after_prompt[: common_prefix(after_prompt, after_question)]
        closing = control.pattern.search(whole.text, answer_end)
        return Style(
            generation_prompt=after_prompt[shared:],
            closing=closing[0] if closing else None,
            unasked=REASONING.sub("", between[len(after_prompt) :]).strip() if between.startswith(after_prompt) else "",
            between=tuple(control.held_by(after_prompt[:shared])),
            headers=tuple(text for text in control.added.findall(header) if not REASONING.fullmatch(text)),
        )


def snapped(text: str, place: int, control: ControlTokens) -> int:
    """Return the position, or the beginning of the added token that contains it."""
    # A window is enough: no added token is longer, and scanning a whole chat for each turn is quadratic.
    first = max(0, place - 100)
    for found in control.added.finditer(text, first, place + 100):
        if found.start() < place < found.end():
            return found.start()
    return place
