"""What became of the data: counts, and everything that was left out, with places and reasons."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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


class Notice(Value):
    """One thing about the data that a user should know before the training: one line on every screen."""

    level: Literal["info", "warning"]
    """`warning`: the run goes on, and its result is likely not what the user wants."""
    message: str
    """One sentence with its counts. Text out of the data is escaped (`printable`)."""
    remedy: str = ""
    """What to do about it; empty for what was done as it should be."""
    places: tuple[str, ...] = ()
    """`file:line` of the first LISTED rows concerned, where rows are."""


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
    notices: tuple[Notice, ...] = ()
    """What was found out, decided and noticed, in the order of the reading."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers."""
    class_counts: tuple[int, ...] = ()
    """Documents of each class in train."""
    stop_token_ids: tuple[int, ...] = ()
    """At which an answer ends, and generation stops; empty where nothing is generated."""
    files: tuple[str, ...]
    one_example: str
    """A training document; «» marks what is supervised."""


@dataclass
class LeftOut:
    """Collects what is left out."""

    folder: Path
    """Of the spec: places are relative to it."""
    entries: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)

    def add(self, split: str, reason: str, place: str) -> None:
        self.entries.setdefault((split, reason), []).append(self.relative(place))

    def info(self, message: str, *, places: Iterable[str] = ()) -> None:
        """Tell what was found or decided."""
        self._notice("info", message, "", places)

    def warn(self, message: str, remedy: str, *, places: Iterable[str] = ()) -> None:
        """Tell what is likely wrong, and what to do about it."""
        self._notice("warning", message, remedy, places)

    def _notice(self, level: Literal["info", "warning"], message: str, remedy: str, places: Iterable[str]) -> None:
        shown = tuple(self.relative(place) for place in itertools.islice(places, LISTED))
        self.notices.append(Notice(level=level, message=message, remedy=remedy, places=shown))

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
