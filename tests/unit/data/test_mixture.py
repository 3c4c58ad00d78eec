"""Weights of sources: exact ratios, nothing repeated, told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.splitting.mixture import mixture


@pytest.mark.parametrize(
    ("rows", "weights", "taken"),
    [
        ((100, 1000), (0.7, 0.3), (100, 43)),
        ((100, 1000), (7, 3), (100, 43)),
        ((1000, 100), (0.7, 0.3), (233, 100)),
        ((40, 40), (2.5, 0.25), (40, 4)),
        ((100, 1000), (0.5, 0.5), (100, 100)),
        ((10, 10, 1000), (1, 1, 2), (10, 10, 20)),
        ((10, 1000), (1000, 1), (10, 1)),
    ],
)
def test_rows_are_to_one_another_as_the_weights(
    rows: tuple[int, ...], weights: tuple[float, ...], taken: tuple[int, ...]
) -> None:
    assert mixture(dict(enumerate(rows)), dict(enumerate(weights))) == dict(enumerate(taken))


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_one_source_is_taken_whole_and_the_others_to_within_half_a_row(sources: list[tuple[int, float]]) -> None:
    rows, weights = (dict(enumerate(part)) for part in zip(*sources, strict=True))
    taken = mixture(rows, weights)
    whole = [source for source in rows if taken[source] == rows[source]]
    scale = min(rows[source] / weights[source] for source in rows)
    assert whole
    for source in rows:
        assert 1 <= taken[source] <= rows[source]
        assert taken[source] == 1 or abs(taken[source] - scale * weights[source]) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("weights", "mix"), [((None, None), (100, 1000)), ((0.7, 0.3), (100, 43)), ((1, 1), (100, 100)), ((2, None), (100, 50))]
)
def test_train_is_mixed_and_the_mix_is_told(
    prepare: Any, rows_of_pairs: Any, weights: tuple[float | None, ...], mix: tuple[int, ...]
) -> None:
    """W01: the shares that are written are the shares of the rows; without weights every row is used once."""
    prepare.jsonl("a.jsonl", rows_of_pairs(100))
    prepare.jsonl("b.jsonl", rows_of_pairs(1000, 100))
    for name, start in (("eval", 2000), ("test", 3000)):
        prepare.jsonl(f"{name}.jsonl", rows_of_pairs(5, start))
    sources = [
        {"path": f"{name}.jsonl"} | ({} if weight is None else {"weight": weight})
        for name, weight in zip("ab", weights, strict=True)
    ]
    summary = prepare.run(train=sources, eval="eval.jsonl", test="test.jsonl")
    answers = [int(answer.split()[1]) for answer in prepare.load("train").answers]
    assert max(Counter(answers).values()) == 1
    assert (sum(n < 100 for n in answers), sum(n >= 100 for n in answers)) == mix
    thinned = sum(entry.count for entry in summary.dropped if entry.reason.startswith("thinned by the weights"))
    assert thinned == 1100 - sum(mix)
    lines = [notice.line for notice in summary.notices]
    told = f"{mix[0] / sum(mix):.1%} a.jsonl ({mix[0]} of 100 rows, weight {weights[0] or 0:g}), "
    assert any(told in line and f"({mix[1]} of 1,000 rows" in line for line in lines) == (weights != (None, None))
    assert not any("are dropped" in line for line in lines), "what was asked for is no loss"
