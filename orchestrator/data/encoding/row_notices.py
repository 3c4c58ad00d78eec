"""Observations on rows during tokenization, counted, and reported in one line each."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.data.summary import LeftOut
from orchestrator.units import printable

ALLOW = "set data.special_tokens_in_text: allow if they are meant as control tokens"
ESCAPED = "{rows} spell control tokens ({what}), which are tokenised as text"
WORDS: dict[str, tuple[str, str]] = {
    "escaped": (f"{ESCAPED}; {ALLOW}", ""),
    "rendered": (ESCAPED, f"{ALLOW}, as in prompts that a chat template has rendered already"),
    "allowed": ("{rows} spell control tokens ({what}), which are read as control tokens (special_tokens_in_text: allow)", ""),
    "ended": ("{rows} already end with the end token ({what}), which is trained on once", ""),
    "begun": ("{rows} already begin with the begin token ({what}), which is written once", ""),
    "tools": (
        "the chat template does not render `tools`, which {rows} have: the model does not see them",
        "use a base whose chat template renders tools, or write them into the system turn",
    ),
    "reasoning": (
        "the chat template leaves out the reasoning of the last answer in {rows}: it is not trained on",
        "use a chat template that renders reasoning_content, or write the reasoning into the content",
    ),
    "beside": ("the chat template leaves out the text beside a tool call in {rows}: it is not trained on", ""),
    "unrendered": (
        "the chat template leaves out an assistant's turn in {rows}: it is not trained on",
        "look at the chat template, or reorder the turns",
    ),
    "unread": (
        "the chat template leaves out a turn that {rows} have before an answer: the model does not see it",
        "look at the chat template; text of a system turn can be written into the first user turn",
    ),
    "header": (
        "the chat template's generation prompt does not write {what}, which stands before the answers of {rows}: it is trained"
        " on as part of them",
        "write it under {% if add_generation_prompt %} in the base's chat template",
    ),
    "prompt": (
        "the generation prompt adds {what}, with which the last answer of {rows} does not begin: prompts in serving will"
        " differ from those in training",
        "write the reasoning into the answers, or serve with the template's switch that turns it off",
    ),
}
"""For each kind of observation its message ({rows}: their number, {what}: the texts concerned) and the remedy."""


@dataclass
class RowNotices:
    """Rows by what was observed about them."""

    places: dict[str, dict[str, None]] = field(default_factory=dict)
    what: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, kind: str, place: str, *what: str) -> None:
        """Count a row once for each kind."""
        self.places.setdefault(kind, {})[place] = None
        self.what.setdefault(kind, {}).update(dict.fromkeys(what))

    def report(self, left_out: LeftOut) -> None:
        """Report one line for each kind observed."""
        for kind, (message, remedy) in WORDS.items():
            places = self.places.get(kind)
            if not places:
                continue
            rows = f"{len(places)} row{'s' if len(places) != 1 else ''}"
            found = list(self.what[kind])
            shown = ", ".join(f"'{printable(text)}'" for text in found[:5]) + (", ..." if len(found) > 5 else "")
            said = message.format(rows=rows, what=shown)
            if remedy:
                left_out.warn(said, remedy, places=places)
            else:
                left_out.info(said, places=places)
