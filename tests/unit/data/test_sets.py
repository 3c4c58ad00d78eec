"""Sets on disk, and sets with their answers shuffled."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import TokenizedSet, build_set, shuffled
from orchestrator.errors import DataError, IntegrityError

sizes = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=40)


def documents(sizes: list[tuple[int, int]]) -> TokenizedSet:
    """A prompt and an answer a document; every token is unlike every other one."""
    ids = iter(range(10**6))
    parts = [
        (np.asarray([next(ids) for _ in range(prompt + answer)]), np.r_[np.zeros(prompt, bool), np.ones(answer, bool)])
        for prompt, answer in sizes
    ]
    names = [str(number) for number in range(len(sizes))]
    return build_set(parts, prompts=names, answers=[f"answer {name}" for name in names])


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    data = documents([(3, 2), (1, 4)])
    data.save(tmp_path / "a.npz")
    again = TokenizedSet.load(tmp_path / "a.npz")
    for name in ("ids", "supervised", "offsets", "labels", "rows"):
        assert getattr(again, name).dtype == getattr(data, name).dtype
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    assert (again.prompts, again.answers, again.sha256) == (data.prompts, data.answers, data.sha256)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_damage_is_told_apart_from_absence(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    data = documents([(3, 2)] * 40)
    data.save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]):
            path.write_bytes(content)
            with contextlib.suppress(IntegrityError):
                assert TokenizedSet.load(path).sha256 == data.sha256
    path.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match=r"a\.npz"):
        TokenizedSet.load(path)
    with pytest.raises(DataError, match="no tokenised set"):
        TokenizedSet.load(tmp_path / "none.npz")


def test_nothing_pickled_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", ids=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(IntegrityError):
        TokenizedSet.load(tmp_path / "a.npz")


@given(sizes, st.data())
def test_a_selection_has_the_chosen_documents_in_order(sizes: list[tuple[int, int]], draw: st.DataObject) -> None:
    data = documents(sizes)
    chosen = np.asarray(draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=8)), dtype=np.int64)
    part = data.select(chosen)
    assert len(part) == len(chosen)
    for place, index in enumerate(chosen.tolist()):
        np.testing.assert_array_equal(part.document(place)[0], data.document(index)[0])
        assert part.prompts[place] == data.prompts[index]
    assert part.num_supervised.tolist() == data.num_supervised[chosen].tolist()


@given(sizes, st.integers(-2, 5))
def test_shuffling_gives_every_answer_away_whole_and_within_the_limit(sizes: list[tuple[int, int]], seed: int) -> None:
    data = documents(sizes)
    mixed = shuffled(data, seed)
    assert len(mixed) == len(data)
    assert mixed.lengths.max() <= data.lengths.max()
    assert Counter(mixed.ids.tolist()) == Counter(data.ids.tolist())
    assert Counter(mixed.answers) == Counter(data.answers)
    assert mixed.prompts == data.prompts
    for index, (prompt, _) in enumerate(sizes):
        ids, supervised = mixed.document(index)
        owner = int(mixed.answers[index].split()[1])
        np.testing.assert_array_equal(ids[:prompt], data.document(index)[0][:prompt])
        np.testing.assert_array_equal(ids[prompt:], data.document(owner)[0][sizes[owner][0] :])
        assert supervised.tolist() == [False] * prompt + [True] * sizes[owner][1]
    assert mixed.sha256 == shuffled(data, seed).sha256


@given(st.integers(2, 200), st.integers(0, 3))
def test_nobody_keeps_its_answer_where_all_fit(count: int, seed: int) -> None:
    mixed = shuffled(documents([(2, 3)] * count), seed)
    assert all(answer != f"answer {number}" for number, answer in enumerate(mixed.answers))


def test_shuffling_is_even_and_follows_the_seed() -> None:
    data = documents([(2, 3)] * 400)
    given_to = [int(answer.split()[1]) for answer in shuffled(data, 0).answers]
    shifts = Counter((other - own) % 400 for own, other in enumerate(given_to))
    assert max(shifts.values()) < 12, "answers move by one pattern"
    assert shuffled(data, 1).answers != shuffled(data, 0).answers


def test_long_prompts_keep_short_answers() -> None:
    data = documents([(10, 1)] * 3 + [(1, 10)] * 3)
    mixed = shuffled(data, 0)
    assert mixed.lengths.tolist() == [11] * 6
    assert all(answer != f"answer {number}" for number, answer in enumerate(mixed.answers))


def test_classes_are_permuted_among_the_texts() -> None:
    data = build_set([(np.arange(3), np.zeros(3, bool))] * 30, labels=list(range(30)))
    mixed = shuffled(data, 0)
    assert sorted(mixed.labels.tolist()) == list(range(30))
    assert (mixed.labels != data.labels).all()
    np.testing.assert_array_equal(mixed.ids, data.ids)
