"""Summary of the prepared data: counts, and everything left out, with places and reasons."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.units import printable
from orchestrator.values import Value

LISTED = 20
"""Number of places listed for each reason; the count is always complete."""
IN_A_LINE = 3
"""Number of places in a notice's line."""
LARGE_LOSS = 0.1
"""Share of lost rows above which a split gives a warning."""
ON_PURPOSE = ("over data.", "thinned by ", "more than a trial ", "equal to a chunk ")
"""Prefixes of reasons for which the spec asks to leave rows out."""
KEPT = "the row is kept"
"""Marks the reasons for rows that are cut and counted, but not left out."""
REMEDIES = (
    ("longer than ", "raise data.max_tokens, or set data.long_rows: truncate_prompt"),
    ("malformed: ", "fix these rows"),
    ("also occurs in ", "give the splits different rows"),
    ("whose group ", "give the splits different groups"),
    ("whose prompt ", "give the splits different prompts; data.dedupe: none keeps these rows"),
    ("whose text ", "give the splits different texts; data.dedupe: none keeps these rows"),
    ("near-duplicate of ", "give the splits different rows; data.dedupe: exact keeps them"),
)
"""Remedy for lost rows, by the beginning of the reason."""


class Dropped(Value):
    """Rows left out of a split (or cut, if the reason says so) for one reason."""

    split: str
    reason: str
    count: int
    places: tuple[str, ...]
    """`file:line` of the first LISTED ones, relative to the spec's folder or from the root, whichever is shorter."""


class Notice(Value):
    """Something about the data that a user should know before training: one line on every screen."""

    level: Literal["info", "warning"]
    """`warning`: the run continues, and its result is probably not what the user wants."""
    message: str
    """One sentence with its counts. Text from the data is escaped (`printable`)."""
    remedy: str = ""
    """Recommended action; empty if none is needed."""
    places: tuple[str, ...] = ()
    """`file:line` of the first LISTED rows concerned."""

    @property
    def line(self) -> str:
        """Message, first places and remedy in one line."""
        shown = ", ".join(self.places[:IN_A_LINE]) + (", ..." if len(self.places) > IN_A_LINE else "")
        return self.message + (f" ({shown})" if shown else "") + (f"; to do: {self.remedy}" if self.remedy else "")


class SplitSummary(Value):
    documents: int
    tokens: int
    supervised_tokens: int
    longest_document_tokens: int
    sha256: str
    """`TokenizedSet.sha256`."""


class DataSummary(Value):
    """Results of `prepare_data`."""

    inputs_sha256: str
    """Hash over the files, the spec's data section, the task, the seed and the tokenizer: equal inputs are not read again."""
    splits: dict[str, SplitSummary]
    """train, eval, test and, if given, retain."""
    dropped: tuple[Dropped, ...]
    notices: tuple[Notice, ...] = ()
    """Findings and decisions, in the order of reading."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their indices."""
    class_counts: tuple[int, ...] = ()
    """Number of training documents of each class."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer and stop generation; empty if nothing is generated."""
    files: tuple[str, ...]
    one_example: str
    """Training document; «» marks supervised parts."""

    @property
    def told(self) -> tuple[Notice, ...]:
        """Everything that a user should know before training, warnings first: the notices, and what was left out."""
        lines = [
            Notice(level="info", message=f"{entry.split}: {entry.count:,} left out, {entry.reason}", places=entry.places)
            if KEPT not in entry.reason
            else Notice(level="info", message=f"{entry.split}: {entry.count:,} {entry.reason}", places=entry.places)
            for entry in self.dropped
        ]
        if len(lines) > LISTED:
            more = f"and {len(lines) - LISTED} more reasons: see `orchestrator data`"
            lines = [*lines[:LISTED], Notice(level="info", message=more)]
        return tuple(sorted([*self.notices, *lines], key=lambda notice: notice.level != "warning"))


@dataclass
class LeftOut:
    """Collects notices, and rows that are left out."""

    folder: Path
    """Folder of the spec: places are relative to it."""
    entries: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)

    def add(self, split: str, reason: str, place: str) -> None:
        self.entries.setdefault((split, printable(reason)), []).append(self.relative(place))

    def info(self, message: str, *, places: Iterable[str] = ()) -> None:
        """Add a finding or decision."""
        self._notice("info", message, "", places)

    def warn(self, message: str, remedy: str, *, places: Iterable[str] = ()) -> None:
        """Add a warning, with what to do about it."""
        self._notice("warning", message, remedy, places)

    def _notice(self, level: Literal["info", "warning"], message: str, remedy: str, places: Iterable[str]) -> None:
        shown = tuple(self.relative(place) for place in itertools.islice(places, LISTED))
        self.notices.append(Notice(level=level, message=printable(message), remedy=printable(remedy), places=shown))

    def relative(self, place: str) -> str:
        """Return the shorter of a place's two names, relative to the spec's folder or from the root; control codes escaped."""
        return printable(min(os.path.relpath(place, self.folder), place, key=len))

    def warn_of_losses(self, kept: Mapping[str, int]) -> None:
        """Warn of splits that lost more than LARGE_LOSS of their rows, with the remedy for the most frequent reason.

        Args:
            kept: Rows of each split that stay.
        """
        for split, rows in kept.items():
            lost = {reason: count for reason, count in self.of(split).items() if is_loss(reason)}
            cut = {reason: count for reason, count in self.of(split).items() if KEPT in reason}
            gone = sum(lost.values())
            if gone > LARGE_LOSS * (gone + rows):
                message = f"{gone:,} of {gone + rows:,} rows of {split} ({gone / (gone + rows):.0%}) are dropped"
                self.warn(f"{message}: {_reasons(lost)}", _remedy(lost))
            elif sum(cut.values()) > LARGE_LOSS * (gone + rows):
                message = f"{sum(cut.values()):,} of {gone + rows:,} rows of {split} are cut"
                self.warn(f"{message}: {_reasons(cut)}", "raise data.max_tokens")

    def of(self, split: str) -> dict[str, int]:
        """Return the counts of one split by reason."""
        return {reason: len(places) for (name, reason), places in self.entries.items() if name == split}

    def summary(self) -> tuple[Dropped, ...]:
        return tuple(
            Dropped(split=split, reason=reason, count=len(places), places=tuple(places[:LISTED]))
            for (split, reason), places in self.entries.items()
        )


def is_loss(reason: str) -> bool:
    """Return True if rows are left out for this reason although the spec did not ask for it."""
    return KEPT not in reason and not reason.startswith(ON_PURPOSE)


def _reasons(counts: Mapping[str, int]) -> str:
    """Return the three most frequent reasons."""
    common = sorted(counts, key=lambda reason: -counts[reason])
    more = [f"{len(common) - 3} more reasons"] if len(common) > 3 else []
    return ", ".join([*(f"{counts[reason]:,} {reason}" for reason in common[:3]), *more])


def _remedy(counts: Mapping[str, int]) -> str:
    kinds = {begins: sum(count for reason, count in counts.items() if reason.startswith(begins)) for begins, _ in REMEDIES}
    return dict(REMEDIES)[max(kinds, key=lambda begins: kinds[begins])]


def listed(items: Iterable[object], separator: str = "\n  ") -> str:
    """Return the first LISTED items, and how many more there are."""
    found: Sequence[object] = list(items)
    more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return separator.join([*map(str, found[:LISTED]), *more])
