"""Replayed documents: their share is exact, their order is a function of the seed, and every one comes before any again."""

from __future__ import annotations

from itertools import islice, repeat
from typing import Any

import numpy as np
import pytest

from orchestrator.data import TokenizedSet, build_set, joined, replayed_documents
from orchestrator.errors import DataError

LENGTHS = np.asarray([5, 9, 14, 3, 7, 30, 11])


def taken(share: float, seed: int = 0, num_steps: int = 40, tokens: int = 50) -> list[np.ndarray]:
    return list(replayed_documents(LENGTHS, [tokens] * num_steps, share, seed))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_at_every_step_the_share_of_all_tokens_so_far_is_exact_to_half_a_document(share: float) -> None:
    replayed = np.cumsum([LENGTHS[step].sum() for step in taken(share)])
    target = 50 * np.arange(1, 41)
    wanted = target * share / (1 - share)
    assert np.abs(replayed - wanted).max() <= LENGTHS.max() / 2
    assert replayed[-1] / (replayed[-1] + target[-1]) == pytest.approx(share, abs=LENGTHS.max() / 2 / target[-1])


def test_every_document_comes_once_before_any_comes_again_in_an_order_of_the_seed() -> None:
    order = np.concatenate(taken(0.5))
    whole = [sorted(order[start : start + 7]) for start in range(0, len(order) - 7, 7)]
    assert whole == [list(range(7))] * len(whole)
    assert np.array_equal(np.concatenate(taken(0.5)), order)
    assert not np.array_equal(np.concatenate(taken(0.5, seed=1)), order)


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    longer = islice(replayed_documents(LENGTHS, repeat(50), 0.3, 0), 40)
    assert [step.tolist() for step in longer] == [step.tolist() for step in taken(0.3)]


def test_joined_sets_are_one_after_the_other() -> None:
    first = build_set([(np.arange(3), np.ones(3, bool)), (np.arange(5), np.zeros(5, bool))], rows=[1, 2])
    second = build_set([(np.arange(4) + 10, np.ones(4, bool))], rows=[9], labels=[2])
    both = joined(first, second)
    assert (len(both), both.num_tokens, both.offsets.tolist()) == (3, 12, [0, 3, 8, 12])
    assert both.document(2)[0].tolist() == [10, 11, 12, 13]
    assert both.document(1)[1].tolist() == [False] * 5
    assert (both.labels.tolist(), both.rows.tolist()) == ([-1, -1, 2], [1, 2, 9])


def row(task: str, number: int) -> dict[str, Any]:
    """Of one question and its answer, as the task reads it."""
    prompt, answer = f"question {number}", f"answer {number}"
    if task == "chat":
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
    return {"text": f"{prompt} {answer}"} if task == "text" else {"prompt": prompt, "completion": answer}


def contents(part: TokenizedSet) -> set[bytes]:
    return {part.document(index)[0].tobytes() for index in range(len(part))}


@pytest.mark.parametrize("task", ["completion", "chat", "text"])
def test_what_another_split_has_is_not_replayed_but_counted_and_listed(prepare: Any, task: str) -> None:
    prepare.jsonl("train.jsonl", [row(task, number) for number in range(40)])
    prepare.jsonl("eval.jsonl", [row(task, number) for number in range(40, 50)])
    prepare.jsonl("test.jsonl", [row(task, number) for number in range(50, 60)])
    prepare.jsonl("general.jsonl", [row(task, number) for number in range(30, 90)])
    data = {"eval": "eval.jsonl", "test": "test.jsonl", "retain": "general.jsonl", "retain_tokens": 60}
    summary = prepare.run(task, replay=0.5, **data)
    sets = {name: contents(prepare.load(name)) for name in ("train", "eval", "test", "retain", "replay")}
    assert sets["replay"]
    for name in ("train", "eval", "test", "retain"):
        assert not sets["replay"] & sets[name], name
    dropped = prepare.dropped(summary)
    for name, first in (("train", 1), ("eval", 11), ("test", 21)):
        assert dropped["retain", f"also occurs in {name}"] == (10, tuple(f"general.jsonl:{first + n}" for n in range(10)))


def test_where_all_that_no_other_split_has_is_scored_nothing_is_left_to_replay(prepare: Any) -> None:
    prepare.jsonl("train.jsonl", [row("completion", number) for number in range(40)])
    prepare.jsonl("test.jsonl", [row("completion", number) for number in range(50, 60)])
    prepare.jsonl("general.jsonl", [row("completion", number) for number in range(50, 61)])
    with pytest.raises(DataError, match=r"all [0-9]+ tokens that are in no other split are scored"):
        prepare.run(replay=0.1, test="test.jsonl", retain="general.jsonl")
