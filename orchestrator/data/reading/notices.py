"""Notices about files and rows before training: one line each, on what was found and what was not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.data.reading.examples import RowReader
from orchestrator.data.reading.files import Found, shown, split_of
from orchestrator.data.reading.formats import DataFile
from orchestrator.data.summary import LeftOut
from orchestrator.spec.models import DataSpec
from orchestrator.store import sha256_file
from orchestrator.units import printable, quoted

MANY_LINES = 20
"""Number of lines from which a text file may be meant as many documents."""


SAY_WHAT_IS_LEARNED = frozenset(("train", "training", "trainable", "loss", "mask", "masked", "ignore"))
"""Keys by which other trainers exclude turns from the loss."""


@dataclass
class SplitReading:
    """Record of how the files of one split were read."""

    split: str
    rows: RowReader
    files: list[DataFile] = field(default_factory=list)
    num_examples: int = 0


def note_files(data: DataSpec, found: Sequence[tuple[str, Found]], left_out: LeftOut) -> None:
    """Report ignored files, files that became splits, and identical files."""
    for name, entry in found:
        where = left_out.relative(entry.path)
        for reason, names in entry.skipped.items():
            left_out.info(f"not read in {where}: {reason} ({len(names)}): {shown(names)}")
        for reason, names in entry.doubtful.items():
            left_out.warn(f"not read in {where}: {reason} ({len(names)}): {shown(names)}", "check that nothing is missing")
        if name == "train" and entry.has_splits:
            _note_splits(data, entry, left_out)
        elif name == "train" and entry.is_glob:
            _note_held_out(entry, "give them as data.eval and data.test, or a pattern that excludes them", left_out)
        elif name == "train":
            _note_held_out(entry, "check that these rows may be trained on", left_out)
    _note_equal(found, left_out)


def _note_held_out(entry: Found, remedy: str, left_out: LeftOut) -> None:
    others = [left_out.relative(str(path)) for path in entry.all_files() if split_of(path.name) in ("eval", "test")]
    if others:
        left_out.warn(f"data.train has files whose names say eval or test: {shown(others)}", remedy)


def _note_splits(data: DataSpec, entry: Found, left_out: LeftOut) -> None:
    taken: list[str] = []
    for split, files in entry.files.items():
        if split == "train" or not isinstance(getattr(data, split), str):
            taken.append(f"{split} {shown([left_out.relative(str(path)) for path in files], 3)}")
    left_out.info(f"the files of {left_out.relative(entry.path)} are its splits by their names: {'; '.join(sorted(taken))}")
    for split in ("eval", "test"):
        share = getattr(data, split)
        if split in entry.files and isinstance(share, float) and share != DataSpec.model_fields[split].default:
            remedy = f"name the training file itself as data.train to take {share:g} of it instead"
            left_out.warn(f"data.{split}: {share:g} is not used, since the folder has files of {split}", remedy)


def _note_equal(found: Iterable[tuple[str, Found]], left_out: LeftOut) -> None:
    """Report files with the same content under different names."""
    by_size: dict[int, list[tuple[str, Path]]] = {}
    for name, entry in found:
        for split, files in entry.files.items():
            for path in files:
                if any(path.samefile(other) for _, other in by_size.get(path.stat().st_size, ())):
                    continue
                by_size.setdefault(path.stat().st_size, []).append((split or name, path))
    for size, entries in by_size.items():
        hashes: dict[str, list[tuple[str, Path]]] = {}
        for split, path in entries if size and len(entries) > 1 else ():
            hashes.setdefault(sha256_file(path), []).append((split, path))
        for same in hashes.values():
            if len(same) > 1:
                names = shown([f"{left_out.relative(str(path))} ({split})" for split, path in same])
                left_out.warn(f"files of equal content: {names}", "remove all but one: their rows count twice")


def note_reading(reading: SplitReading, left_out: LeftOut) -> None:
    """Report how the rows of a split were read, and which parts were not."""
    rows, split = reading.rows, reading.split
    kinds = Counter(file.label for file in reading.files)
    if len(reading.files) == 1:
        files = f"{printable(left_out.relative(str(reading.files[0].path)))} is {reading.files[0].label}"
    else:
        files = f"{len(reading.files)} files ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"
    left_out.info(f"{split}: {files}; {_layouts(reading)}")
    unread = sorted(rows.unread_columns())
    if unread:
        names = shown([quoted(name) for name in unread], 10)
        if rows.columns_look_like_alpaca:
            remedy = "set data.format: alpaca, or join columns to a prompt with data.template"
            left_out.warn(
                f"{split}: columns that are not read: {names}; these look like Alpaca rows whose input would be lost", remedy
            )
        else:
            left_out.info(f"{split}: columns that are not read: {names}")
    notes = rows.notes
    if notes.unread_keys:
        keys = shown([f"{quoted(key)} ({len(places)})" for key, places in sorted(notes.unread_keys.items())], 10)
        places = next(iter(notes.unread_keys.values()))
        message = f"{split}: keys of turns that are not read (in how many turns): {keys}"
        if notes.unread_keys.keys() & SAY_WHAT_IS_LEARNED:
            left_out.warn(message, "set weight: 0 in turns that should not be trained on", places=places)
        else:
            left_out.info(message, places=places)
    if notes.empty_answers:
        message = f"{split}: {len(notes.empty_answers)} turns of the assistant are empty and are not trained on"
        left_out.warn(message, "fill them, or remove these rows", places=notes.empty_answers)
    if notes.num_weights:
        left_out.info(f"{split}: {notes.num_weights} turns have a weight; those of weight 0 are not trained on")
    _note_kinds(reading, left_out)


def _layouts(reading: SplitReading) -> str:
    """Return how rows were read and why."""
    rows = reading.rows
    counts: dict[tuple[str, str], int] = {}
    for entry in rows.readings.values():
        if entry.layout is not None and entry.count:
            layout = entry.layout
            columns = " and ".join(quoted(name) for name in layout.required)
            why = f"the column{'s' if len(layout.required) > 1 else ''} {columns}"
            counts[layout.format, why] = counts.get((layout.format, why), 0) + entry.count
    if not counts:
        return "no row can be used"
    said = " (data.format)" if rows.spec.data.format != "auto" and reading.split != "retain" else ""
    parts: list[str] = []
    for (name, why), count in sorted(counts.items(), key=lambda item: -item[1]):
        parts.append(f"{count:,} row{'s' if count != 1 else ''} read as {name}{said} by {why}")
    if rows.notes.num_sharegpt:
        parts.append(f"turns with ShareGPT's from and value in {rows.notes.num_sharegpt:,} of them")
    return "; ".join(parts)


def _note_kinds(reading: SplitReading, left_out: LeftOut) -> None:
    texts = [file for file in reading.files if file.kind == "text"]
    if not texts:
        return
    split = reading.split
    if len(texts) < len(reading.files):
        names = shown([left_out.relative(str(file.path)) for file in texts])
        left_out.warn(f"{split}: text files beside files of rows: {names}", "give them as a separate source")
    how = reading.rows.spec.data.text_documents
    if how != "file":
        left_out.info(f"{split}: each {how} of a text file is one document (data.text_documents)")
        return
    left_out.info(f"{split}: each text file is one document, cut into chunks of data.max_tokens")
