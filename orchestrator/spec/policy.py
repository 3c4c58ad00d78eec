"""Grammar of layer policies: `none`, `head`, `last:N`, `first:N`, `blocks:0-3,8`, `all`, `top:F`; with `+head`, `+router`,
`+embeddings`, `+new_tokens` and `+norms` what is trained besides.

`anatomy.select` resolves a policy on a base.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from orchestrator.errors import SelectionError

Kind = Literal["none", "head", "last", "first", "blocks", "all", "top"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Extra = Literal["head", "router", "embeddings", "new_tokens", "norms"]
EXTRAS: tuple[Extra, ...] = get_args(Extra)
"""What can be trained besides, in the order of the normal form."""
FORMS = "none | head | last:N | first:N | blocks:0-3,8 | all | top:0.25; add +head, +router, +embeddings, +new_tokens or +norms"
EXAMPLES: dict[str, str] = {
    "none": "none",
    "head": "head",
    "last": "last:2",
    "first": "first:2",
    "blocks": "blocks:0-3,8",
    "all": "all",
    "top": "top:0.25",
}


@dataclass(frozen=True)
class Policy:
    """A parsed layer policy."""

    kind: Kind
    count: int = 0
    """Number of blocks for `last` and `first`."""
    ranges: tuple[tuple[int, int], ...] = ()
    """First and last block of each run of `blocks`, ascending and not adjacent."""
    fraction: float = 0.0
    """Share of the blocks for `top`."""
    extras: tuple[Extra, ...] = ()
    """What is trained besides, in the order of EXTRAS, each once."""

    @property
    def with_head(self) -> bool:
        return "head" in self.extras

    @property
    def with_router(self) -> bool:
        """Whether the routers of the chosen blocks are trained, which choose the experts of a token."""
        return "router" in self.extras

    def without(self, extra: Extra) -> Policy:
        """Return the same policy without this extra."""
        return replace(self, extras=tuple(kept for kept in self.extras if kept != extra))

    def __str__(self) -> str:
        """Return the normal form: `parse_policy(str(policy)) == policy`."""
        match self.kind:
            case "last" | "first":
                text = f"{self.kind}:{self.count}"
            case "blocks":
                text = "blocks:" + ",".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ranges)
            case "top":
                text = f"top:{self.fraction:g}"
            case _:
                text = self.kind
        return "+".join((text, *self.extras))


def parse_policy(text: str) -> Policy:
    """Parse a policy, ignoring spaces and case.

    Raises:
        SelectionError: not a policy; `expected` lists the forms, `remedy` suggests a similar one.
    """
    compact = re.sub(r"\s+", "", text).lower()
    body, *added = compact.split("+")
    word, colon, argument = body.partition(":")
    kind: Kind | None = next((kind for kind in KINDS if kind == word), None)
    if kind is None:
        raise _unknown(text, compact)
    extras = _parse_extras(text, added)
    if kind in ("none", "head", "all") and colon:
        raise _wrong(text, f"`{kind}` takes no argument", f"write {kind}")
    if kind == "none" and extras:
        raise _wrong(text, "`none` trains nothing", "write none")
    if kind == "head" and "head" in extras:
        raise _wrong(text, "`+head` goes with blocks", "write head")
    if kind == "head" and "router" in extras:
        raise _wrong(text, "`+router` goes with blocks", "write last:2+router")
    return replace(_blocks(text, kind, argument), extras=extras)


def _blocks(text: str, kind: Kind, argument: str) -> Policy:
    """Return the policy of these blocks."""
    match kind:
        case "last" | "first":
            if not re.fullmatch(r"[0-9]{1,4}", argument) or int(argument) < 1:
                remedy = "write none" if argument == "0" else f"write {kind}:2"
                raise _wrong(text, f"`{kind}` needs a number of blocks, at least 1", remedy)
            return Policy(kind, count=int(argument))
        case "blocks":
            return Policy(kind, ranges=_parse_ranges(text, argument))
        case "top":
            return Policy(kind, fraction=_parse_fraction(text, argument))
        case _:
            return Policy(kind)


def normal_form(text: str) -> str:
    """Return the normal form: `last: 2` -> `last:2`, `blocks:8,0-3` -> `blocks:0-3,8`. Raises SelectionError like
    `parse_policy`."""
    return str(parse_policy(text))


def _parse_extras(text: str, added: list[str]) -> tuple[Extra, ...]:
    if len(set(added)) < len(added):
        raise _wrong(text, "the same thing is added twice", "write each once")
    unknown = next((word for word in added if word not in EXTRAS), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, EXTRAS, n=1, cutoff=0.4) or ["head"]
        meant = re.sub(r"\s+", "", text).lower().replace(f"+{unknown}", f"+{near[0]}", 1)
        raise _wrong(text, "not a layer policy", f"did you mean {meant}?")
    if {"embeddings", "new_tokens"} <= set(added):
        raise _wrong(text, "`+embeddings` trains the rows of new tokens too", "write one of +embeddings and +new_tokens")
    return tuple(extra for extra in EXTRAS if extra in added)


def _parse_ranges(text: str, argument: str) -> tuple[tuple[int, int], ...]:
    blocks: set[int] = set()
    for part in argument.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        if match is None:
            raise _wrong(text, f"{part!r} is neither a block nor a range of blocks", "write blocks:0-3,8")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise _wrong(text, f"the range {part} is reversed", f"write blocks:{high}-{low}")
        blocks.update(range(low, high + 1))
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return tuple(runs)


def _parse_fraction(text: str, argument: str) -> float:
    try:
        fraction = float(argument)
    except ValueError:
        fraction = 0.0
    if not 0.0 < fraction <= 1.0:
        raise _wrong(text, "`top` needs a share of the blocks, between 0 and 1", "write top:0.25")
    return fraction


def _unknown(text: str, compact: str) -> SelectionError:
    """Return the error for `lst:2`, `last2`, `last=2` or `4`, with the policy that was probably meant."""
    match = re.fullmatch(r"([a-z]*)[^a-z0-9+]*([0-9.,-]*)((?:\+.*)?)", compact)
    word, argument, extra = match.groups() if match else (compact, "", "")
    near = difflib.get_close_matches(word, EXAMPLES, n=1, cutoff=0.5)
    if not word and re.fullmatch("[0-9]+", argument):
        remedy = f"did you mean last:{argument}?"
    elif near:
        argument = argument.lstrip("-")
        meant = near[0] if ":" not in EXAMPLES[near[0]] else f"{near[0]}:{argument}" if argument else EXAMPLES[near[0]]
        remedy = f"did you mean {meant}{'+head' if extra else ''}?"
    else:
        remedy = "write for example last:2"
    return _wrong(text, "not a layer policy", remedy)


def _wrong(text: str, what: str, remedy: str) -> SelectionError:
    return SelectionError(f"{text!r}: {what}", expected=FORMS, remedy=remedy)
