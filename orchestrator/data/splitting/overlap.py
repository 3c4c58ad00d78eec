"""Report rows with the same content: within train, across splits, with different answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from orchestrator.data.reading.examples import Example
from orchestrator.data.splitting.duplicates import RowKeys, answer_of, questions_of
from orchestrator.data.summary import LeftOut
from orchestrator.units import printable

Dedupe = Literal["exact", "near", "none"]
SHOWN_CHARACTERS = 60
SERIOUS = 0.1
MIN_SERIOUS = 3
"""Number of near-duplicates from which, at this share of an evaluation split, they give a warning."""


def asked_name(example: Example) -> str:
    """Return the name of what a row is compared by."""
    return "text" if example.text is not None else "prompt"


def note_instructions(instructions: Mapping[str, int], num_rows: int, left_out: LeftOut) -> None:
    """Report that a prompt shared by most rows does not distinguish them."""
    for prompt, count in instructions.items():
        left_out.info(
            f"{count:,} of {num_rows:,} rows of train have one prompt, {shown(prompt)}: "
            "taken as an instruction; rows are compared by prompt and answer"
        )


def note_repeated_rows(examples: Sequence[Example], keys: RowKeys, left_out: LeftOut) -> None:
    """Count rows of train that repeat another one; they are kept, and weigh more."""
    _, first = np.unique(keys.row, return_index=True)
    again = np.ones(len(examples), bool)
    again[first] = False
    if again.any():
        left_out.info(
            f"{int(again.sum()):,} of {len(examples):,} rows of train duplicate another row; they are kept",
            places=(examples[index].place for index in np.flatnonzero(again).tolist()),
        )


def note_contradictions(examples: Sequence[Example], keys: RowKeys, left_out: LeftOut) -> None:
    """Count prompts with more than one answer, and texts with more than one class.

    For an instruction (`find_instructions`) the answer is part of the key, so it never counts.
    """
    _, inverse, counts = np.unique(keys.question, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero((counts[inverse] > 1) & (keys.question != 0))
    groups: dict[int, list[int]] = {}
    for index in repeated.tolist():
        groups.setdefault(int(inverse[index]), []).append(index)
    several = [rows for rows in groups.values() if len({answer_of(examples[index]) for index in rows}) > 1]
    if not several:
        return
    rows = [index for group in several for index in group]
    places = (examples[index].place for index in rows)
    example = shown(questions_of(examples[several[0][0]])[-1])
    if examples[rows[0]].label is not None:
        left_out.warn(
            f"{_count(several, 'text')} ({len(rows):,} rows) with more than one label, such as {example}",
            "correct the labels: a model cannot learn both; equal texts stay in one split",
            places=places,
        )
    else:
        left_out.warn(
            f"{_count(several, 'prompt')} ({len(rows):,} rows) with more than one answer, such as {example}",
            "no action is needed if several answers are correct; equal prompts stay in one split",
            places=places,
        )


def note_shared_rows(
    examples: Sequence[Example], split: np.ndarray, keys: RowKeys, clusters: np.ndarray, dedupe: Dedupe, left_out: LeftOut
) -> None:
    """Count rows of eval and test that also occur in train or in each other: exactly (`none`), or nearly.

    Args:
        split: str[N]: of each row.
        clusters: int64[N]: of near-duplicates.
    """
    for judge, other in (("eval", "train"), ("test", "train"), ("test", "eval")):
        mine, theirs = np.flatnonzero(split == judge), np.flatnonzero(split == other)
        if not len(mine) or not len(theirs):
            continue
        equal = np.isin(keys.question[mine], keys.question[theirs]) & (keys.question[mine] != 0)
        equal |= np.isin(keys.row[mine], keys.row[theirs])
        near = np.isin(clusters[mine], clusters[theirs]) & ~equal
        if equal.any():
            left_out.warn(
                (
                    f"{int(equal.sum()):,} of {len(mine):,} rows of {judge} have a {asked_name(examples[0])} that also "
                    f"occurs in {other}"
                ),
                "set data.dedupe: exact to keep them in one split: rows in both splits do not measure performance on unseen rows",
                places=(examples[index].place for index in mine[equal].tolist()),
            )
        if near.any():
            message = f"{int(near.sum()):,} of {len(mine):,} rows of {judge} are near-duplicates of rows of {other}"
            places = (examples[index].place for index in mine[near].tolist())
            if near.sum() >= max(MIN_SERIOUS, SERIOUS * len(mine)) and other == "train":
                left_out.warn(message, "set data.dedupe: near to keep them in one split", places=places)
            else:
                left_out.info(message, places=places)


def shown(text: str) -> str:
    """Return the beginning of a foreign text, quoted, on one line."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return f"'{printable(cut)}'"


def _count(groups: Sequence[object], name: str) -> str:
    return f"{len(groups):,} {name}{'s' if len(groups) != 1 else ''}"
