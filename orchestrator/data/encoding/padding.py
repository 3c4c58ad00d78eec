"""The padding token of a classifier: a token that ends no text, because transformers reads a decoder's class off the last token
that is not padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.encoder import load_tokenizer
from orchestrator.data.sets import TokenizedSet
from orchestrator.errors import BaseError
from orchestrator.spec.models import DataSpec
from orchestrator.work.execution import Padding

ODD_TEXTS = (
    "!",
    "Yes!",
    "a",
    "?",
    " ",
    "\n",
    "0",
    "a\n\n",
    "...",
    "\N{IDEOGRAPHIC FULL STOP}",
    "\u16a0 \U000132f9",
)
"""Texts that end in what has been a padding token somewhere, hardly any text at all, and characters that few tokenizers know."""
LONG_WORDS = 200
"""Words of the longest odd text."""


@dataclass(frozen=True)
class _Facts:
    """What a choice depends on."""

    candidates: tuple[int, ...]
    """Ids in order of preference, each once."""
    control: frozenset[int]
    """Ids that no ordinary text contains."""
    ends: dict[int, str]
    """Ids that end a text -> where it was seen."""
    rows: int
    """Rows of the base's embedding."""


def choose_padding(folder: Path, data: DataSpec, sets: Iterable[TokenizedSet], *, fixed: bool, rows: int) -> Padding:
    """Return the padding token of a classifier on this base, for training and for the bundle.

    Preferred is the config's, then the tokenizer's, then its other special tokens. It must be special, so that ordinary text
    does not contain it, end no document and none of the odd texts, and have a row in the embedding.

    Args:
        folder: The base's folder.
        data: How control tokens in a text are read.
        sets: All documents that are trained on or scored.
        fixed: True for an encoder: its class finds no position by the padding token, and may number positions by it.
        rows: Rows of the embedding.

    Raises:
        BaseError: there is no such token; says why each one is unfit.
    """
    tokenizer = load_tokenizer(folder)
    given = _config_padding(folder)
    if fixed and given is not None:
        return Padding(token_id=given, token=str(tokenizer.convert_ids_to_tokens(given) or ""))
    control = ControlTokens(tokenizer)
    ends = {int(number): "ends a document" for each in sets for number in each.ids[each.offsets[1:] - 1]}
    for ids in odd_documents(tokenizer, escape=data.special_tokens_in_text == "escape"):
        ends.setdefault(ids[-1], "ends every text" if ids[-1] in control.ids.values() else "ends an ordinary text")
    named = sorted(control.ids.items(), key=lambda entry: (_rank(tokenizer, entry[0]), entry[1]))
    candidates = dict.fromkeys(
        number for number in (given, tokenizer.pad_token_id, *(number for _, number in named)) if number is not None
    )
    facts = _Facts(tuple(candidates), frozenset(control.ids.values()), ends, rows)
    chosen = next((number for number in facts.candidates if not why_unfit(facts, number)), None)
    if chosen is None:
        tried = "; ".join(f"{_spelled(tokenizer, number)} {why_unfit(facts, number)}" for number in facts.candidates)
        raise BaseError(
            f"no token can pad texts to classify: {tried or 'the tokenizer has no special token'}",
            where=str(folder / "tokenizer_config.json"),
            expected="a special token that ends no text: transformers reads the class off the last token that is not padding",
            remedy="name an unused special token as pad_token in tokenizer_config.json",
        )
    return Padding(token_id=chosen, token=str(tokenizer.convert_ids_to_tokens(chosen)))


def why_unfit(facts: _Facts, number: int) -> str:
    """Return why a token cannot pad texts; empty if it can."""
    if not 0 <= number < facts.rows:
        return f"has no row among the {facts.rows} of the embedding"
    if number not in facts.control:
        return "is not a special token, so that ordinary text may contain it"
    return facts.ends.get(number, "")


def odd_documents(tokenizer: Any, *, escape: bool = True) -> list[list[int]]:
    """Return the ids of texts whose last token is easily mistaken, as training encodes them; those without a token are left out.

    Args:
        escape: Whether control tokens in a text are ordinary text, so that texts of nothing else are among them.
    """
    control = ControlTokens(tokenizer)
    texts = [*ODD_TEXTS, "word " * LONG_WORDS]
    special = [text for token in control.ids for text in (token, f"a text {token}")]
    found: list[list[int]] = [tokenizer(text)["input_ids"] for text in texts]
    if escape:
        found += [control.text_ids(control.stand_in(text), special=True) for text in special]
    return [ids for ids in found if ids]


def _config_padding(folder: Path) -> int | None:
    """Return the padding token of the base's config, transformers' default included; None for none and for -1."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    given = getattr(config.get_text_config(), "pad_token_id", None)
    return given if type(given) is int and given >= 0 else None


def _rank(tokenizer: Any, token: str) -> int:
    """Return the place of a special token in the order of preference: one that its authors reserved, one of another use, and
    last those that begin texts or stand for unknown characters."""
    if token in (tokenizer.bos_token, tokenizer.unk_token, tokenizer.cls_token):
        return 3
    lowered = token.lower()
    if "pad" in lowered and not any(word in lowered for word in ("vision", "image", "video", "audio")):
        return 0
    return 1 if any(word in lowered for word in ("reserved", "unused", "extra", "dummy")) else 2


def _spelled(tokenizer: Any, number: int) -> str:
    token: str | Sequence[str] | None = tokenizer.convert_ids_to_tokens(number) if 0 <= number < len(tokenizer) else None
    return f"{token!r} ({number})"
