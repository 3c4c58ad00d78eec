"""What became of the data: counts, and everything that was left out, with places and reasons."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.values import Value

LISTED = 20
"""How many places of one kind are listed; the count is always whole."""


class Dropped(Value):
    """Rows left out of a split (or cut, where the reason says so) for one reason."""

    split: str
    reason: str
    count: int
    places: tuple[str, ...]
    """`file:line` of the first LISTED ones, from the spec's folder or from the root, whichever is shorter."""


class SplitSummary(Value):
    documents: int
    tokens: int
    supervised_tokens: int
    longest_document_tokens: int
    sha256: str
    """`TokenizedSet.sha256`."""


class DataSummary(Value):
    """What `prepare_data` found and wrote."""

    inputs_sha256: str
    """Over the files, the spec's data section, the task, the seed and the tokenizer: the same inputs are not read again."""
    splits: dict[str, SplitSummary]
    """train, eval, test and, where there is one, retain."""
    dropped: tuple[Dropped, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers."""
    class_counts: tuple[int, ...] = ()
    """Documents of each class in train."""
    files: tuple[str, ...]
    one_example: str
    """A training document; «» marks what is supervised."""


@dataclass
class LeftOut:
    """Collects what is left out."""

    folder: Path
    """Of the spec: places are relative to it."""
    entries: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, split: str, reason: str, place: str) -> None:
        self.entries.setdefault((split, reason), []).append(self.relative(place))

    def relative(self, place: str) -> str:
        """The shorter of a place's two names, from the spec's folder or from the root."""
        return min(os.path.relpath(place, self.folder), place, key=len)

    def of(self, split: str) -> dict[str, int]:
        """Counts of one split by reason."""
        return {reason: len(places) for (name, reason), places in self.entries.items() if name == split}

    def summary(self) -> tuple[Dropped, ...]:
        return tuple(
            Dropped(split=split, reason=reason, count=len(places), places=tuple(places[:LISTED]))
            for (split, reason), places in self.entries.items()
        )


def listed(items: Iterable[object], separator: str = "\n  ") -> str:
    """The first LISTED items, and how many more there are."""
    found: Sequence[object] = list(items)
    more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return separator.join([*map(str, found[:LISTED]), *more])
