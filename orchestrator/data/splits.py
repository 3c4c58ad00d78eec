"""Which row goes to which split: seeded, groups kept together, no row in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.data.rows import Example
from orchestrator.data.seeded import WEIGHTS, generator
from orchestrator.data.summary import LeftOut
from orchestrator.errors import DataError
from orchestrator.spec import LoadedSpec


@dataclass(frozen=True)
class Splits:
    """Examples of each split, and what was taken out since it also stood elsewhere."""

    train: list[Example]
    eval: list[Example]
    test: list[Example]
    duplicates: list[tuple[Example, str, str]]
    """(example, the split it was removed from, the split that keeps it)."""


def make_splits(loaded: LoadedSpec, found: dict[str, list[Example]], left_out: LeftOut) -> dict[str, list[Example]]:
    """train, eval and test: shares taken off train, duplicates removed, train's sources weighted.

    Raises:
        DataError: a split has no row left.
    """
    data, seed = loaded.spec.data, loaded.spec.train.seed
    shares = {name: getattr(data, name) for name in ("eval", "test") if name not in found}
    eval_share, test_share = (shares.get(name, 0.0) for name in ("eval", "test"))
    parts = split_by_share(found["train"], eval_share, test_share, seed)
    parts |= {name: found[name] for name in ("eval", "test") if name in found}
    splits = remove_shared(parts["train"], parts["eval"], parts["test"])
    for example, split, keeper in splits.duplicates:
        left_out.add(split, f"also stands in {keeper}", example.place)
    result = {"train": _weighted(splits.train, seed, left_out), "eval": splits.eval, "test": splits.test}
    for name, part in result.items():
        if not part:
            raise _empty(loaded, name, len(found["train"]), left_out)
    return result


def _empty(loaded: LoadedSpec, name: str, num_rows: int, left_out: LeftOut) -> DataError:
    """Why a split has no row: all of its own were removed, or train has none to spare."""
    reasons = [f"{count} {reason}" for reason, count in left_out.of(name).items()]
    if not reasons and name != "train":
        keeps = "of each class train keeps a row" if loaded.spec.task == "classify" else "rows of one group stay in one split"
        reasons = [f"train has {num_rows} row{'s' if num_rows != 1 else ''}; {keeps}, and eval and test share the rest"]
    return DataError(
        f"no row is left for {name}" + (f" ({'; '.join(reasons)})" if reasons else ""),
        where=loaded.where(f"data.{name}"),
        expected="at least one",
        remedy="give more rows, or another share or path",
    )


def split_by_share(examples: Sequence[Example], eval_share: float, test_share: float, seed: int) -> dict[str, list[Example]]:
    """Take shares of eval and test off train; a share above 0 takes at least one row.

    Whole groups are taken, in an order that a hash of the seed and the group's name gives, as long as they fit in the
    share. A row without a group is a group of its own; rows of equal content are one too, so that a duplicate never
    lands on two sides. Every class keeps its first group in train, and every split takes each class in proportion (`_quotas`)
    as far as whole groups allow.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_group_of(example), []).append(example)
    order = sorted(groups, key=lambda name: _hash(f"{seed}/{name}"))
    first_of_class = {example.label: name for name in reversed(order) for example in groups[name] if example.label is not None}
    kept = set(first_of_class.values())
    classes = {name: _classes(groups[name]) for name in order}
    counts = _classes(examples)
    chosen: dict[str, str] = {}
    for split, share in (("test", test_share), ("eval", eval_share)):
        if share > 0:
            free = {name: classes[name] for name in order if name not in kept and name not in chosen}
            room = _classes(example for name in free for example in groups[name])
            wanted = max(1, round(share * len(examples)))
            ties = sorted(counts, key=lambda label: _hash(f"{seed}/{split}/{label}"))
            quotas = _quotas({label: share * counts[label] for label in ties}, room, wanted)
            chosen |= dict.fromkeys(_take(free, quotas, wanted), split)
    result: dict[str, list[Example]] = {"train": [], "eval": [], "test": []}
    for example in examples:
        result[chosen.get(_group_of(example), "train")].append(example)
    return result


def _quotas(exact: Mapping[str | None, float], room: Mapping[str | None, int], wanted: int) -> Counter[str | None]:
    """Rows of each class in a split of `wanted` rows: within one of its exact share, by largest remainder (Hamilton).

    A class with less room than its share leaves the rest to the others, whose remainder then counts past one row.

    Args:
        exact: A class's share of the split, in rows; of equal remainders the first counts.
        room: Rows of each class that may be taken.
    """
    quotas = Counter({label: min(int(share), room[label]) for label, share in exact.items()})
    for _ in range(min(wanted, sum(room.values())) - quotas.total()):
        open_to = [label for label in exact if quotas[label] < room[label]]
        quotas[max(open_to, key=lambda label: exact[label] - quotas[label])] += 1
    return quotas


def _take(groups: Mapping[str, Counter[str | None]], quotas: Counter[str | None], wanted: int) -> list[str]:
    """The first groups that fit in their classes' quotas, then those that fit in what is left of the `wanted` rows; the
    smallest one where none fits."""
    taken: dict[str, None] = {}
    left = quotas.copy()
    for name, classes in groups.items():
        if all(count <= left[label] for label, count in classes.items()):
            taken[name] = None
            left.subtract(classes)
            wanted -= classes.total()
        if not wanted:
            break
    for name, classes in groups.items():
        if name not in taken and classes.total() <= wanted:
            taken[name] = None
            wanted -= classes.total()
    return list(taken) or sorted(groups, key=lambda name: groups[name].total())[:1]


def _classes(examples: Iterable[Example]) -> Counter[str | None]:
    """Rows of each class; of a task without classes, all of them are of one."""
    return Counter(example.label for example in examples)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


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


def _weighted(examples: list[Example], seed: int, left_out: LeftOut) -> list[Example]:
    """Rows repeated or thinned by their source's weight: 2.5 gives every row twice and a seeded half of them once more."""
    by_source: dict[int, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    result: list[Example] = []
    for source, rows in sorted(by_source.items()):
        whole, part = divmod(rows[0].weight, 1.0)
        order = generator(seed, WEIGHTS + source).permutation(len(rows))
        once_more = set(order[: round(part * len(rows))].tolist())
        for index, row in enumerate(rows):
            times = int(whole) + (index in once_more)
            result += [row] * times
            if not times:
                left_out.add("train", f"thinned by the source's weight {row.weight:g}", row.place)
    return result
