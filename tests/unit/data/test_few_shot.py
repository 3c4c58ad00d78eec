"""Examples before a document: whole, as many as fit, not scored, and none of the document's own tokens lost."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.data import TokenizedSet, build_set
from orchestrator.data.few_shot import with_shots


def numbered(lengths: list[int], first: int) -> TokenizedSet:
    """Every document is a number repeated; its last two tokens are supervised."""
    documents = [(np.full(n, first + index), np.arange(n) >= n - 2) for index, n in enumerate(lengths)]
    return build_set(documents, prompts=["p"] * len(lengths), answers=["a"] * len(lengths))


ASKED, EXAMPLES = numbered([10, 30, 12], 100), numbered([8, 9, 20, 7, 11, 6], 0)


def shots_of(data: TokenizedSet, index: int, own_length: int) -> list[int]:
    """Which examples stand before a document; whole ones, or the lengths would not fit."""
    ids = data.document(index)[0][: data.lengths[index] - own_length]
    found, counts = np.unique(ids, return_counts=True)
    assert [int(EXAMPLES.lengths[example]) for example in found] == counts.tolist()
    return found.tolist()


def test_each_document_has_examples_of_its_own_and_is_scored_as_before() -> None:
    found = with_shots(ASKED, EXAMPLES, 2, limit=200, seed=0)
    assert (found.fewest, found.mean) == (2, 2.0)
    for index, length in enumerate((10, 30, 12)):
        ids, supervised = found.data.document(index)
        assert ids[-length:].tolist() == [100 + index] * length
        assert supervised.tolist() == [False] * (len(ids) - 2) + [True] * 2
        assert len(shots_of(found.data, index, length)) == 2
    drawn = {tuple(shots_of(with_shots(ASKED, EXAMPLES, 2, 200, seed).data, 0, 10)) for seed in range(20)}
    assert len(drawn) > 3
    assert found.data.answers == ASKED.answers
    assert np.array_equal(found.data.num_supervised, ASKED.num_supervised)


@pytest.mark.parametrize("limit", [30, 36, 44, 60])
def test_no_document_is_longer_than_the_base_can_read(limit: int) -> None:
    found = with_shots(ASKED, EXAMPLES, 4, limit=limit, seed=1)
    assert found.data.lengths.max() <= limit
    assert found.fewest == len(shots_of(found.data, 1, 30))
    if limit == 30:
        assert found.fewest == 0
    if limit == 36:
        assert found.fewest == 1, "the one example of six tokens fits"
