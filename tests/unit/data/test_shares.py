"""Shares of a training set: exact, seeded, one within the other, of each class its part."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from orchestrator.data import TokenizedSet, build_set, documents_of_share, documents_of_steps, size_of_share
from orchestrator.plan.schedule import SHARES, curve_shares
from orchestrator.plan.values import DataSize


def of(count: int, labels: list[int] | None = None) -> TokenizedSet:
    lengths = np.random.default_rng(0).integers(3, 30, count)
    return build_set([(np.arange(length), np.ones(length, bool)) for length in lengths], labels=labels)


@pytest.mark.parametrize("count", [24, 97, 600])
def test_a_share_is_exact_and_lies_within_every_larger_one(count: int) -> None:
    data = of(count)
    chosen = [documents_of_share(data, share, seed=3) for share in (*SHARES, 1.0)]
    assert [len(each) for each in chosen] == [round(share * count) for share in (*SHARES, 1.0)]
    for smaller, larger in itertools.pairwise(chosen):
        assert set(smaller) < set(larger)
        assert np.all(np.diff(larger) > 0), "in the set's own order, each once"
    assert np.array_equal(chosen[-1], np.arange(count))


def test_a_share_follows_the_seed() -> None:
    data = of(200)
    first, again, other = (set(documents_of_share(data, 0.25, seed)) for seed in (1, 1, 2))
    assert first == again
    assert 5 < len(first & other) < 25, "another seed takes other documents, which meet these by chance alone"


def test_every_share_has_each_class_by_its_part() -> None:
    labels = [0] * 160 + [1] * 80 + [2] * 40 + [3] * 8
    data = of(len(labels), labels)
    for share in SHARES:
        counts = Counter(data.labels[documents_of_share(data, share, seed=5)].tolist())
        for label, whole in Counter(labels).items():
            assert counts[label] == pytest.approx(share * whole, abs=1)


def test_a_share_leaves_no_class_out_while_there_are_documents_enough() -> None:
    data = of(77 * 9, [label for label in range(77) for _ in range(9)])
    assert set(data.labels[documents_of_share(data, 0.125, seed=0)]) == set(range(77))


def test_the_size_of_a_share_is_counted() -> None:
    data, size = of(100), DataSize(train_documents=100, train_tokens=1600, steps_per_epoch=9, eval_tokens=7, retain_tokens=5,
                                   longest_document_tokens=30)  # fmt: skip
    part = data.select(documents_of_share(data, 0.25, seed=2))
    found = size_of_share(size, data, 0.25, tokens_per_step=64, seed=2)
    assert (found.train_documents, found.train_tokens) == (25, part.num_tokens)
    assert found.steps_per_epoch == len(documents_of_steps(part.offsets, 64, 2, 0))
    assert (found.eval_tokens, found.longest_document_tokens) == (7, 30)


@pytest.mark.parametrize(
    ("count", "shares"), [(864, SHARES), (24, SHARES), (9, SHARES[1:]), (6, SHARES[1:]), (4, ()), (1, ()), (0, ())]
)
def test_a_curve_takes_four_different_shares(count: int, shares: tuple[float, ...]) -> None:
    assert curve_shares(count) == shares
