"""`top:F`: how many blocks, which ones, and what stands in for them before they are scored."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.anatomy import LayerSelection, ModelAnatomy, read_anatomy, select
from orchestrator.anatomy.selection import best_scored, num_of_share
from orchestrator.errors import SelectionError
from orchestrator.spec.models import Tune

from .bases import config_of, write_base

SCORES = (0.2, 0.9, 0.5)


@cache
def llama() -> ModelAnatomy:
    with TemporaryDirectory() as folder:
        return read_anatomy(write_base(Path(folder), config_of("llama", tie_word_embeddings=True)), need_weights=False)


def pick(policy: str, tune: Tune = "full", *, task: str = "completion", **values: object) -> LayerSelection:
    classes = 4 if task == "classify" else 0
    rank = 4 if tune == "lora" else None
    return select(llama(), policy, tune, rank, task=task, num_classes=classes, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "blocks", "count"), [(0.25, 8, 2), (0.25, 7, 2), (0.01, 8, 1), (0.1, 30, 3), (0.07, 100, 7), (1.0, 8, 8)]
)
def test_the_share_is_rounded_up_and_at_least_one(share: float, blocks: int, count: int) -> None:
    assert num_of_share(share, blocks) == count


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_whole_share_of_blocks_is_no_block_more(count: int, blocks: int) -> None:
    if count <= blocks:
        assert num_of_share(count / blocks, blocks) == count


def test_the_best_are_taken_and_of_equals_those_nearer_to_the_output() -> None:
    assert best_scored([0.1, 0.5, 0.5, 0.4], 1) == [2]
    assert best_scored([0.1, 0.5, 0.5, 0.4], 3) == [1, 2, 3]
    assert best_scored([None, 0.1, None, 0.3], 3) == [1, 3]


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("head", ["", "+head"])
@pytest.mark.parametrize("task", ["completion", "classify"])
def test_with_scores_it_is_the_same_as_naming_the_blocks(tune: Tune, head: str, task: str) -> None:
    chosen = pick(f"top:0.5{head}", tune, task=task, scores=SCORES)
    named = pick(f"blocks:1,2{head}", tune, task=task)
    assert chosen.model_copy(update={"policy": named.policy}) == named
    assert chosen.policy == ("top:0.5" if task == "classify" else f"top:0.5{head}")
    assert chosen.blocks == (1, 2)
    assert not chosen.pending


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_without_scores_no_choice_can_weigh_more(tune: Tune) -> None:
    pending = pick("top:0.5", tune)
    assert (pending.pending, pending.cut, len(pending.blocks), pending.policy) == (True, 0, 2, "top:0.5")
    for blocks in combinations(range(3), 2):
        named = pick("blocks:" + ",".join(map(str, blocks)), tune)
        assert pending.num_trainable_parameters >= named.num_trainable_parameters
        assert pending.cut <= named.cut


def test_all_of_them_need_no_scores() -> None:
    assert pick("top:1").model_copy(update={"policy": "all"}) == pick("all")


def test_too_few_blocks_with_a_score() -> None:
    with pytest.raises(SelectionError, match="2 of the blocks by score, and 1 have one"):
        pick("top:0.5", scores=(None, None, 1.0))


def test_every_selection_says_its_blocks() -> None:
    assert [pick(policy).blocks for policy in ("none", "head", "last:2", "blocks:0,2+head")] == [(), (), (1, 2), (0, 2)]
