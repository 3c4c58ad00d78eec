"""Shares and duplicates: properties over many sets of rows."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.reading.examples import Example
from orchestrator.data.splitting.splits import Share, split_by_share

UNCAPPED = 10**6


def example(number: int, content: int | None = None, group: int | None = None, label: int | None = None) -> Example:
    content = number if content is None else content
    return Example(
        file="f",
        line=number,
        content_key=f"c{content}",
        group=None if group is None else f"group/{group}",
        label=None if label is None else str(label),
    )


def split(
    examples: list[Example], ev: float, te: float, seed: int, *, eval_rows: int = UNCAPPED, test_rows: int = UNCAPPED
) -> dict[str, list[Example]]:
    """Rows of each split, grouped by their group or else by their content."""
    names = [example.group or example.content_key for example in examples]
    shares = {"test": Share(te, test_rows), "eval": Share(ev, eval_rows)}
    chosen = split_by_share(examples, names, shares, seed)
    return {name: [e for e, c in zip(examples, chosen, strict=True) if c == name] for name in ("train", "eval", "test")}


rows = st.lists(
    st.tuples(st.integers(0, 30), st.none() | st.integers(0, 9), st.none() | st.integers(0, 3)), min_size=3, max_size=60
).map(lambda rows: [example(number, *row) for number, row in enumerate(rows)])
share = st.sampled_from([0.0, 0.1, 0.25, 0.4])


@given(rows, share, share, st.integers(-3, 3))
def test_shares_partition_the_rows_and_keep_groups_together(examples: list[Example], ev: float, te: float, seed: int) -> None:
    parts = split(examples, ev, te, seed)
    assert Counter(e.line for part in parts.values() for e in part) == Counter(e.line for e in examples)
    assert all([e.line for e in part] == sorted(e.line for e in part) for part in parts.values())
    home: dict[str, str] = {}
    for name, part in parts.items():
        for row in part:
            assert home.setdefault(row.group or row.content_key, name) == name
    assert {e.label for e in examples} <= {e.label for e in parts["train"]} | {None}
    assert parts == split(examples, ev, te, seed)


def test_shares_are_of_the_asked_size_and_another_seed_takes_others() -> None:
    examples = [example(number) for number in range(1000)]
    parts = split(examples, 0.1, 0.2, 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 700, "eval": 100, "test": 200}
    other = split(examples, 0.1, 0.2, 1)
    assert other["test"] != parts["test"]
    assert len(split(examples, 0.0, 0.0, 0)["train"]) == 1000


def test_new_rows_leave_the_old_ones_in_their_splits() -> None:
    old = [example(number) for number in range(500)]
    more = [example(number) for number in range(520)]
    before, after = (split(rows, 0.1, 0.1, 0) for rows in (old, more))
    moved = {e.line for e in before["test"]} - {e.line for e in after["test"]}
    assert len(moved) <= 4


def test_a_share_of_few_rows_takes_one_and_a_big_group_does_not_take_all() -> None:
    assert {name: len(part) for name, part in split([example(n) for n in range(4)], 0.1, 0.1, 0).items()} == {
        "train": 2,
        "eval": 1,
        "test": 1,
    }
    grouped = [example(n, group=0) for n in range(90)] + [example(n, group=n) for n in range(90, 100)]
    for seed in range(20):
        assert len(split(grouped, 0.0, 0.1, seed)["test"]) == 10


def test_a_rare_class_stays_in_train() -> None:
    examples = [example(n, label=0) for n in range(50)] + [example(99, label=1)]
    for seed in range(30):
        assert any(e.label == "1" for e in split(examples, 0.3, 0.3, seed)["train"])


classed = st.lists(st.integers(0, 5), min_size=8, max_size=120).map(
    lambda labels: [example(number, label=label) for number, label in enumerate(labels)]
)


@given(classed, share, share, st.integers(-3, 3))
def test_each_class_is_split_in_proportion(examples: list[Example], ev: float, te: float, seed: int) -> None:
    parts = split(examples, ev, te, seed)
    have = Counter(e.label for e in examples)
    before: Counter[str | None] = Counter()
    for name, wanted in (("test", te), ("eval", ev)):
        found = Counter(e.label for e in parts[name])
        room = {label: have[label] - 1 - before[label] for label in have}
        rows = max(1, round(wanted * len(examples))) if wanted else 0
        if sum(have.values()) - len(have) < sum(max(1, round(share * len(examples))) for share in (ev, te) if share):
            assert found.total() >= min(rows, 1) or sum(have.values()) - len(have) < 2, "too few are shared"
            return
        assert found.total() == min(rows, sum(room.values()))
        if all(room[label] >= wanted * have[label] for label in have):
            assert all(abs(found[label] - wanted * have[label]) < 1 for label in have), name
        before += found


def test_eight_rows_of_two_classes_give_each_split_both() -> None:
    examples = [example(n, label=n % 2) for n in range(8)]
    for seed in range(20):
        parts = split(examples, 0.25, 0.25, seed)
        assert {name: sorted(e.label or "" for e in part) for name, part in parts.items()} == {
            "train": ["0", "0", "1", "1"],
            "eval": ["0", "1"],
            "test": ["0", "1"],
        }


def test_where_there_are_more_classes_than_rows_to_take_the_splits_take_other_classes() -> None:
    examples = [example(n, label=n % 10) for n in range(20)]
    chosen = set()
    for seed in range(20):
        parts = split(examples, 0.1, 0.1, seed)
        judging = [e.label for name in ("eval", "test") for e in parts[name]]
        assert len(parts["eval"]) == len(parts["test"]) == 2
        assert len(set(judging)) == 4
        assert len({e.label for e in parts["train"]}) == 10
        chosen.add(tuple(judging))
    assert len(chosen) > 10


def test_a_group_of_several_classes_stays_whole_and_the_share_is_filled() -> None:
    examples = [example(n, group=n // 5, label=n % 7 % 3) for n in range(200)]
    for seed in range(20):
        parts = split(examples, 0.1, 0.2, seed)
        assert {name: len(part) for name, part in parts.items()} == {"train": 140, "eval": 20, "test": 40}
        groups = [{e.group for e in part} for part in parts.values()]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 40


def test_rows_without_classes_are_taken_in_the_order_of_their_hashes() -> None:
    """What every split of a task without classes was since the first release."""
    examples = [example(n, content=n * 7 % 23, group=n % 11 if n % 3 else None) for n in range(60)]
    parts = split(examples, 0.1, 0.2, 3)
    assert [e.line for e in parts["eval"]] == [3, 15, 17, 27, 28, 50]
    assert [e.line for e in parts["test"]] == [0, 5, 8, 12, 16, 19, 36, 38, 41, 49, 52, 57]


def test_what_is_over_a_cap_stays_in_train() -> None:
    examples = [example(n, group=n // 2) for n in range(200)]
    parts = split(examples, 0.1, 0.2, 0, eval_rows=6, test_rows=12)
    assert {name: len(part) for name, part in parts.items()} == {"train": 182, "eval": 6, "test": 12}
    whole = split(examples, 0.1, 0.2, 0)
    assert {e.line for e in parts["test"]} < {e.line for e in whole["test"]}
    assert not {e.group for e in parts["train"]} & {e.group for e in parts["test"]}


def test_a_cap_takes_each_class_in_proportion() -> None:
    examples = [example(n, label=n % 10 == 0) for n in range(1000)]
    parts = split(examples, 0.2, 0.2, 0, eval_rows=50, test_rows=100)
    assert {name: sum(e.label == "True" for e in part) for name, part in parts.items()} == {"train": 85, "eval": 5, "test": 10}


def test_a_group_of_nearly_all_rows_stays_in_train_and_the_others_are_shared() -> None:
    examples = [example(n, group=max(0, n - 54)) for n in range(60)]
    for seed in range(20):
        parts = split(examples, 0.1, 0.1, seed)
        assert len(parts["eval"]) == len(parts["test"]) == 2
        assert {e.line for e in parts["train"]} >= set(range(55))


def test_two_groups_cannot_make_three_splits() -> None:
    parts = split([example(n, group=n % 2) for n in range(60)], 0.1, 0.1, 0)
    assert not all(parts.values())
    assert not split([], 0.1, 0.1, 0)["train"]
