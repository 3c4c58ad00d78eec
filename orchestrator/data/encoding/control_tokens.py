"""Control tokens, and text that spells one: it is tokenized as text, so that no row can begin or end a turn.

A fast tokenizer splits a text at its added tokens first, regardless of their origin. Text is therefore tokenized by a copy of
the tokenizer in which every control token has another, unguessable spelling: ids and white space treatment are the same, and
the usual spelling of a control token is ordinary text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

PRIVATE_USE = range(0xF0000, 0x10F000)
"""Unicode's private-use planes: stand-ins are taken from them while a row is rendered."""
BEFORE_NAME, BEFORE_SPELLING = "\U0010fffc", "\U0010fffd"
REASONING = re.compile(r"\W*((start|begin|end)_(of_)?)?(think|thinking|thought|reasoning)\W*", re.IGNORECASE)
"""Tags around reasoning belong to the answer, even if the tokenizer marks them as special."""


class ControlTokens:
    """Tokens that control a model instead of carrying text: special added tokens, and others that a caller names.

    Args:
        tokenizer: A fast one.
        others: Added tokens that are not marked special and still begin or end a turn.
    """

    def __init__(self, tokenizer: Any, others: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = {str(token.content): (int(number), token) for number, token in tokenizer.added_tokens_decoder.items()}
        self.ids = {text: number for text, (number, token) in added.items() if token.special}
        self.ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids |= {text: added[text][0] for text in others}
        # Some tokenizers declare an empty special token, which would match everywhere.
        self.ids = {text: number for text, number in self.ids.items() if text}
        """Text of each control token -> its id."""
        self.added = one_of(added)
        """Matches any added token, special or not."""
        self.pattern = one_of(self.ids)
        """Matches any control token."""
        # Random for each process, so that no row can spell a stand-in. It never reaches the ids, which stay the same.
        secret = secrets.token_hex(8)
        names = {text: f"{secret}{place:x}" for place, text in enumerate(sorted(self.ids))}
        self._stand_ins = {text: f"{BEFORE_NAME}{name}{BEFORE_NAME}" for text, name in names.items()}
        """Control token -> its stand-in while a row that spells it is rendered."""
        self._spellings = {text: f"{BEFORE_SPELLING}{name}{BEFORE_SPELLING}" for text, name in names.items()}
        """Control token -> its spelling in `plain`."""
        self._literal = {stand_in: text for text, stand_in in self._stand_ins.items()}
        self._stands = re.compile(f"{BEFORE_NAME}{secret}[0-9a-f]+{BEFORE_NAME}")

    @cached_property
    def exact(self) -> Any:
        """Return the tokenizer's backend with offsets that include white space: a trimming post-processor gives white space
        tokens empty offsets."""
        backend = self._tokenizer.backend_tokenizer
        # The setting is not exposed as an attribute; the processor's text form shows it, nested processors included.
        if "trim_offsets=True" not in str(backend.post_processor):
            return backend
        return _changed(backend, lambda parts: parts.update(post_processor=_untrimmed(parts["post_processor"])))

    @cached_property
    def plain(self) -> Any:
        """Return the backend that treats control tokens as ordinary text; their ids have the private spellings."""
        return _changed(self._tokenizer.backend_tokenizer, self._respell)

    def _respell(self, parts: dict[str, Any]) -> None:
        """Respell the control tokens among the added tokens, and in the vocabulary and merges, which could produce one from
        text."""
        parts["post_processor"] = _untrimmed(parts["post_processor"])
        for token in parts["added_tokens"]:
            if token["content"] in self._spellings:
                token.update(content=self._spellings[token["content"]], normalized=False)
        model = parts["model"]
        renamed = lambda text: self._spellings.get(text, text)  # noqa: E731
        # BPE and WordPiece store a mapping, Unigram a list of (text, score).
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed(text): number for text, number in model["vocab"].items()}
        else:
            model["vocab"] = [[renamed(text), score] for text, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = renamed(model["unk_token"])
        if "merges" in model:
            # Older tokenizer.json files write a merge as one string, newer ones as a pair.
            pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & self._spellings.keys()]

    def held_by(self, text: str) -> list[str]:
        """Return the control tokens that a text spells, in order."""
        return self.pattern.findall(text)

    def stand_in(self, text: str) -> str:
        """Replace the control tokens that a text spells by stand-ins; `literal` reverses it."""
        return self.pattern.sub(lambda found: self._stand_ins[found[0]], text)

    def stand_in_answer(self, text: str) -> str:
        """Do the same as `stand_in`, but keep the tags around reasoning."""
        return self.pattern.sub(lambda found: found[0] if REASONING.fullmatch(found[0]) else self._stand_ins[found[0]], text)

    def stood_for(self, text: str) -> list[str]:
        """Return the control tokens whose stand-ins a text contains."""
        return [self._literal[found] for found in self._stands.findall(text)]

    def literal(self, text: str) -> str:
        """Replace stand-ins by the row's own text."""
        return self._stands.sub(lambda found: self._literal[found[0]], text)

    def spelled(self, text: str) -> str:
        """Return a rendering as `plain` reads it: the template's control tokens respelled, the row's written out."""
        return self.literal(self.pattern.sub(lambda found: self._spellings[found[0]], text))

    def without_ends(self, text: str, ends: Sequence[str]) -> tuple[str, list[str]]:
        """Return (an answer without the end tokens that it already ends with, those tokens)."""
        taken: list[str] = []
        # Repeated, since exported chats may end with several of them.
        while end := next((end for end in ends if end and text.rstrip().endswith(end)), None):
            text = text.rstrip().removesuffix(end)
            taken.append(end)
        return text, taken

    def text_ids(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text in which stand-ins are ordinary text, and control tokens keep their meaning.

        Args:
            special: Whether the tokenizer puts its own special tokens around it.
        """
        return self.plain.encode(self.spelled(text), add_special_tokens=special).ids


def one_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for any of the texts, longest match first; matches nothing if there are none."""
    # Longest first: alternation takes the first match, and one token's text may begin another's.
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or r"(?!)")


def _changed(backend: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    from tokenizers import Tokenizer

    # The tokenizers library has no API to rename tokens; a round trip through its JSON does it.
    parts = json.loads(backend.to_str())
    change(parts)
    return Tokenizer.from_str(json.dumps(parts))


def _untrimmed(processor: Any) -> Any:
    """Return a post-processor, with those nested in it, that leaves offsets unchanged."""
    if isinstance(processor, dict):
        return {key: False if key == "trim_offsets" else _untrimmed(value) for key, value in processor.items()}
    return [_untrimmed(value) for value in processor] if isinstance(processor, list) else processor
