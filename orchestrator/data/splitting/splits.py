"""Assign rows to splits: seeded, rows with the same content in one split, no row in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from orchestrator.data.reading.examples import Example
from orchestrator.data.splitting.duplicates import (
    Kind,
    RowKeys,
    components,
    find_instructions,
    group_of,
    near_clusters,
    row_keys,
    same_as,
)
from orchestrator.data.splitting.mixture import mixed
from orchestrator.data.splitting.overlap import (
    Dedupe,
    asked_name,
    note_contradictions,
    note_instructions,
    note_repeated_rows,
    note_shared_rows,
)
from orchestrator.data.summary import LeftOut
from orchestrator.errors import DataError
from orchestrator.spec import LoadedSpec
from orchestrator.units import printable

SPLITS = ("train", "eval", "test")
MAX_NOTICES = 3
"""Number of notices repeated in the error for a split without rows."""
JUDGES = (("eval", "test"), ("train", "test"), ("train", "eval"))
"""(split that loses a shared row, split that keeps it), in the order in which rows are removed."""
REASONS: dict[Kind, str] = {
    "row": "also occurs in {}",
    "question": "whose {asked} also occurs in {}",
    "group": "whose group also occurs in {}",
    "near": "near-duplicate of a row of {}",
}


@dataclass(frozen=True)
class Compared:
    """All rows read for train, eval and test, with their duplicates."""

    examples: list[Example]
    split: np.ndarray
    """str[N]: split whose files contain the row."""
    keys: RowKeys
    clusters: np.ndarray
    """int64[N]: near-duplicate cluster."""


@dataclass(frozen=True)
class Share:
    """Share that a split takes of train."""

    share: float
    cap: int


def make_splits(loaded: LoadedSpec, found: Mapping[str, list[Example]], left_out: LeftOut) -> dict[str, list[Example]]:
    """Return train, eval and test: duplicates of evaluation rows removed from train, shares taken from it, its sources mixed
    by weight.

    Raises:
        DataError: a split has no row left.
    """
    data, seed = loaded.spec.data, loaded.spec.train.seed
    rows = _compare(found, left_out)
    for name in ("eval", "test"):
        if data.group and name in found and not any(map(group_of, found[name])):
            left_out.info(f"{name} has no value in data.group = {data.group!r}: it is not checked for train's groups")
    kept = _apart(rows, data.dedupe, left_out)
    pool = kept & (rows.split == "train")
    examples = [rows.examples[index] for index in np.flatnonzero(pool).tolist()]
    names = _names(examples, rows.keys.select(pool), rows.clusters[pool], data.dedupe)
    shares = {
        name: Share(share, cap)
        for name, share, cap in (("test", data.test, data.test_rows), ("eval", data.eval, data.eval_rows))
        if isinstance(share, float) and name not in found
    }
    split = rows.split.copy()
    split[pool] = split_by_share(examples, names, shares, seed)
    split[~kept] = ""
    parts = {
        name: [rows.examples[index] for index in np.flatnonzero(split == name).tolist()] for name in ("train", "eval", "test")
    }
    for name, part in parts.items():
        if not part:
            raise _empty(loaded, name, examples, names, len(shares), left_out)
    _note_results(rows, split, shares, data.dedupe, left_out)
    return parts | {"train": mixed(parts["train"], data.train, seed, left_out)}


def _compare(found: Mapping[str, list[Example]], left_out: LeftOut) -> Compared:
    examples = [example for name in SPLITS for example in found.get(name, ())]
    split = np.asarray([name for name in SPLITS for _ in found.get(name, ())], dtype="U5")
    keys = row_keys(examples)
    # Keys are computed twice, since instructions are found by the first and change the second.
    instructions = find_instructions(found["train"], keys.question[split == "train"])
    if instructions:
        keys = row_keys(examples, frozenset(instructions))
    clusters = near_clusters(examples, keys, frozenset(instructions))
    note_instructions(instructions, len(found["train"]), left_out)
    note_contradictions(examples, keys, left_out)
    return Compared(examples, split, keys, clusters)


def _apart(rows: Compared, dedupe: Dedupe, left_out: LeftOut) -> np.ndarray:
    """Return bool[N]: the rows to keep if several splits have files; a row in two of them stays in the one that evaluates:
    test before eval before train."""
    kept = np.ones(len(rows.examples), bool)
    kinds: tuple[Kind, ...] = ("group",) if dedupe == "none" else ("row", "question", "group")
    # Test first: what it shares with eval is decided before train gives up its rows.
    for loser, keeper in JUDGES:
        mine, theirs = kept & (rows.split == loser), kept & (rows.split == keeper)
        if not mine.any() or not theirs.any():
            continue
        same = same_as(rows.keys.select(mine), rows.keys.select(theirs))
        hits: dict[Kind, np.ndarray] = {kind: same[kind] for kind in kinds}
        if dedupe == "near":
            hits["near"] = np.isin(rows.clusters[mine], rows.clusters[theirs])
        where = np.flatnonzero(mine)
        for kind, hit in hits.items():
            for index in where[hit & kept[where]].tolist():
                example = rows.examples[index]
                left_out.add(loser, REASONS[kind].format(keeper, asked=asked_name(example)), example.place)
            kept[where[hit]] = False
    return kept


def _names(examples: Sequence[Example], keys: RowKeys, clusters: np.ndarray, dedupe: Dedupe) -> list[str]:
    """Return the key that each row is split by: one name for all rows that have to stay together, independent of the others.

    A row that shares nothing is named by its group, or by its content.
    """
    own = [group_of(example) or example.content_key for example in examples]
    if dedupe == "none":
        seen: Counter[str] = Counter()
        for index, example in enumerate(examples):
            if not group_of(example):
                seen[own[index]] += 1
                own[index] += f"/{seen[own[index]]}" if seen[own[index]] > 1 else ""
        return own
    kinds: tuple[Kind, ...] = ("row", "question", "group", *(("near",) if dedupe == "near" else ()))
    roots = components(keys, kinds, clusters).tolist()
    lowest: dict[int, str] = {}
    for root, name in zip(roots, own, strict=True):
        lowest[root] = min(lowest.get(root, name), name)
    return [lowest[root] for root in roots]


def _note_results(rows: Compared, split: np.ndarray, shares: Mapping[str, Share], dedupe: Dedupe, left_out: LeftOut) -> None:
    train = split == "train"
    note_repeated_rows([rows.examples[index] for index in np.flatnonzero(train).tolist()], rows.keys.select(train), left_out)
    note_shared_rows(rows.examples, split, rows.keys, rows.clusters, dedupe, left_out)
    pool = int(sum((split == name).sum() for name in {"train", *shares}))
    for name, asked in shares.items():
        got, wanted = int((split == name).sum()), wanted_rows(asked, pool)
        if not wanted / 2 <= got <= 2 * wanted:
            left_out.warn(
                f"{name} has {got:,} rows where data.{name} asks for {wanted:,} of {pool:,}: rows of one group stay together",
                f"give {name} its own file, or more rows",
            )


def _empty(
    loaded: LoadedSpec, name: str, examples: Sequence[Example], names: Sequence[str], num_shares: int, left_out: LeftOut
) -> DataError:
    """Return the error for a split without rows: all of its own were removed, or train has too few."""
    reasons = [f"{count} {reason}" for reason, count in left_out.of(name).items()]
    removed = bool(reasons)
    if not reasons or name == "train":
        reasons += _why_not_shared(loaded, examples, names, num_shares)
    noticed = [notice.message for notice in left_out.notices if notice.level == "warning" or len(examples) <= 1]
    reasons += noticed[:MAX_NOTICES]
    remedy = "give more rows, or another share or path"
    if removed and loaded.spec.data.dedupe != "none":
        remedy += "; data.dedupe: none keeps rows that are in two splits"
    return DataError(
        f"no row is left for {name}" + (f" ({'; '.join(reasons)})" if reasons else ""),
        where=loaded.where(f"data.{name}"),
        expected="at least one",
        remedy=remedy,
    )


def _why_not_shared(loaded: LoadedSpec, examples: Sequence[Example], names: Sequence[str], num_shares: int) -> list[str]:
    """Return why train's rows cannot be divided among the splits."""
    data, count = loaded.spec.data, len(examples)
    if not count:
        return []
    rows = f"train has {count} row{'s' if count != 1 else ''}"
    sizes = Counter(names).most_common()
    if count > 1 and len({example.content_key for example in examples}) == 1:
        return [f"all {count} rows are equal"]
    if len(sizes) < count and len(sizes) <= num_shares:
        by = [f"a value of data.group = {printable(repr(data.group))}"] if data.group else []
        by += [] if data.dedupe == "none" else [f"a {asked_name(examples[0])}"]
        shared = f"rows that have {' or '.join(by)} in common" + (", or are near-duplicates," if data.dedupe == "near" else "")
        name, size = sizes[0]
        place = examples[names.index(name)].place
        groups = "1 group" if len(sizes) == 1 else f"{len(sizes)} groups, the largest of {size} rows"
        return [f"{rows} in {groups} (such as {place}); {shared} stay in one split"]
    kept = "train keeps a row of each class" if loaded.spec.traits.has_labels else "rows of one group stay in one split"
    return [f"{rows}; {kept}, and eval and test share the rest"]


def wanted_rows(asked: Share, num_rows: int) -> int:
    """Return the rows that a share takes: at least one, at most its cap; the excess stays in train."""
    return min(asked.cap, max(1, round(asked.share * num_rows)))


def split_by_share(examples: Sequence[Example], names: Sequence[str], shares: Mapping[str, Share], seed: int) -> list[str]:
    """Return the split of each row: shares are taken from train; one above 0 takes at least one row.

    Whole groups (rows of one name) are taken, in an order that a hash of the seed and the name gives, as long as they fit in the
    share. Every class keeps its first group in train, and every split takes each class in proportion (`_quotas`) as far as whole
    groups allow. Where that leaves a split without a row, the largest group stays in train, and the shares are of what it leaves.

    Args:
        names: Name of each row's group.
        shares: By split, in the order in which they take.
    """
    groups: dict[str, list[Example]] = {}
    for example, name in zip(examples, names, strict=True):
        groups.setdefault(name, []).append(example)
    shares = {split: asked for split, asked in shares.items() if asked.share > 0}
    chosen = _choose(groups, shares, seed, frozenset())
    # A single large group may fill a share, and leave no row for another split or for train.
    starved = len({*chosen.values()}) < len(shares) or len(chosen) == len(groups)
    if groups and starved:
        largest = max(groups, key=lambda name: len(groups[name]))
        held = _choose(groups, shares, seed, frozenset([largest]))
        chosen = held if len({*held.values()}) == len(shares) else chosen
    return [chosen.get(name, "train") for name in names]


def _choose(groups: Mapping[str, list[Example]], shares: Mapping[str, Share], seed: int, held: frozenset[str]) -> dict[str, str]:
    """Return the split of each group that is taken from train; groups in `held` stay."""
    order = sorted(groups, key=lambda name: _hash(f"{seed}/{name}"))
    first_of_class = {example.label: name for name in reversed(order) for example in groups[name] if example.label is not None}
    kept = {*first_of_class.values(), *held}
    counts = _classes(example for group in groups.values() for example in group)
    alone = {label: Counter([label]) for label in counts}
    classes = {name: _classes(rows) if len(rows := groups[name]) > 1 else alone[rows[0].label] for name in order}
    total = counts.total()
    wanted = {split: wanted_rows(asked, total) for split, asked in shares.items()}
    if held:
        wanted = _scaled(wanted, sum(classes[name].total() for name in order if name not in kept))
    chosen: dict[str, str] = {}
    free = {name: classes[name] for name in order if name not in kept}
    room = counts.copy()
    for name in kept:
        room.subtract(classes[name])
    for split, asked in shares.items():
        # Capped or scaled: the class quotas must follow the rows really taken.
        share = asked.share if wanted[split] == max(1, round(asked.share * total)) else wanted[split] / total
        # Ties are broken by a hash, so that no class is favoured by its name.
        ties = sorted(counts, key=lambda label: _hash(f"{seed}/{split}/{label}"))
        quotas = _quotas({label: share * counts[label] for label in ties}, room, wanted[split])
        for name in _take(free, quotas, wanted[split]):
            chosen[name] = split
            room.subtract(free.pop(name))
    return chosen


def _scaled(wanted: Mapping[str, int], room: int) -> dict[str, int]:
    """Scale the row counts down in proportion to fit the available rows; at least one each."""
    factor = min(1.0, room / max(1, sum(wanted.values())))
    return {split: max(1, int(count * factor)) for split, count in wanted.items()}


def _quotas(exact: Mapping[str | None, float], room: Mapping[str | None, int], wanted: int) -> Counter[str | None]:
    """Return the rows of each class in a split of `wanted` rows: within one of its exact share, by largest remainder
    (Hamilton).

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
    """Return the first groups that fit in their classes' quotas, then those that fit in the rest of the `wanted` rows; the
    smallest group if none fits."""
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
        if not wanted:
            break
        if name not in taken and classes.total() <= wanted:
            taken[name] = None
            wanted -= classes.total()
    return list(taken) or sorted(groups, key=lambda name: groups[name].total())[:1]


def _classes(examples: Iterable[Example]) -> Counter[str | None]:
    """Return the number of rows of each class; without classes, all rows count as one."""
    return Counter(map(attrgetter("label"), examples))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
