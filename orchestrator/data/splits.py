"""Which row goes to which split: seeded, groups kept together, no row in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.data.rows import Example


@dataclass(frozen=True)
class Splits:
    """Examples of each split, and what was taken out since it also stood elsewhere."""

    train: list[Example]
    eval: list[Example]
    test: list[Example]
    duplicates: list[tuple[Example, str, str]]
    """(example, the split it was removed from, the split that keeps it)."""


def split_by_share(examples: Sequence[Example], eval_share: float, test_share: float, seed: int) -> dict[str, list[Example]]:
    """Take shares of eval and test off train; a share above 0 takes at least one row.

    Whole groups are taken, in an order that a hash of the seed and the group's name gives, as long as they fit in the
    share. A row without a group is a group of its own; rows of equal content are one too, so that a duplicate never
    lands on two sides. Every class keeps its first group in train.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_group_of(example), []).append(example)
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    first_of_class = {example.label: name for name in reversed(order) for example in groups[name] if example.label is not None}
    free = [name for name in order if name not in set(first_of_class.values())]
    chosen: dict[str, str] = {}
    for split, share in (("test", test_share), ("eval", eval_share)):
        if share > 0:
            taken = _take(free, groups, max(1, round(share * len(examples))))
            chosen |= dict.fromkeys(taken, split)
            free = [name for name in free if name not in chosen]
    result: dict[str, list[Example]] = {"train": [], "eval": [], "test": []}
    for example in examples:
        result[chosen.get(_group_of(example), "train")].append(example)
    return result


def _take(names: list[str], groups: dict[str, list[Example]], wanted: int) -> list[str]:
    """The first groups that together are at most `wanted` rows; the smallest one where none fits."""
    taken: list[str] = []
    for name in names:
        if len(groups[name]) <= wanted:
            taken.append(name)
            wanted -= len(groups[name])
        if not wanted:
            break
    return taken or sorted(names, key=lambda name: len(groups[name]))[:1]


def _group_of(example: Example) -> str:
    return example.group or example.content_key


def remove_shared(train: list[Example], evaluation: list[Example], test: list[Example]) -> Splits:
    """Rows that occur in two splits stay in the one that judges: test before eval before train."""
    duplicates: list[tuple[Example, str, str]] = []
    in_test = {example.content_key for example in test}
    kept_eval = _without(evaluation, in_test, "eval", "test", duplicates)
    in_eval = {example.content_key for example in kept_eval}
    kept_train = _without(train, in_test, "train", "test", duplicates)
    kept_train = _without(kept_train, in_eval, "train", "eval", duplicates)
    return Splits(kept_train, kept_eval, test, duplicates)


def _without(
    examples: list[Example], keys: set[str], split: str, keeper: str, removed: list[tuple[Example, str, str]]
) -> list[Example]:
    kept: list[Example] = []
    for example in examples:
        if example.content_key in keys:
            removed.append((example, split, keeper))
        else:
            kept.append(example)
    return kept
