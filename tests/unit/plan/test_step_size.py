"""How many tokens a step has where the spec leaves it to the plan, and what is said of too few steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from orchestrator.plan import estimate_data_size, make_plan
from orchestrator.plan.data_size import (
    MAX_STEP_TOKENS,
    MIN_TOTAL_STEPS,
    TOO_FEW_STEPS,
    DataSize,
    auto_tokens_per_step,
    too_few_steps_warning,
)
from orchestrator.plan.schedule import StepSize, filling_step, row_tokens, tokens_per_step, total_steps

SIZES = [1, 2, 8, 30, 100, 240, 300, 1000, 7500, 10_000, 52_000, 500_000, 10_000_000]


def steps_of(documents: int, mean: int, epochs: float = 2.0) -> float:
    tokens = documents * mean
    return epochs * tokens / auto_tokens_per_step(documents, tokens, mean, epochs)


@pytest.mark.parametrize(
    ("documents", "mean", "tokens", "steps"),
    [
        # documents, their mean length, tokens of a step, steps of two epochs
        (30, 20, 32, 37.5),
        (100, 100, 256, 78.1),
        (240, 28, 112, 120.0),
        (300, 20, 96, 125.0),
        (1000, 300, 2384, 251.7),
        (7500, 150, 3248, 692.7),
        (10_000, 15, 384, 781.2),
        (52_000, 100, 5712, 1820.7),
        (10_000_000, 500, MAX_STEP_TOKENS, 152587.9),
    ],
)
def test_the_rule(documents: int, mean: int, tokens: int, steps: float) -> None:
    assert auto_tokens_per_step(documents, documents * mean, mean, 2.0) == tokens
    assert steps_of(documents, mean) == pytest.approx(steps, abs=0.1)


@pytest.mark.parametrize("mean", [20, 150, 500])
def test_more_documents_never_make_smaller_steps_or_fewer_of_them(mean: int) -> None:
    tokens = [auto_tokens_per_step(documents, documents * mean, mean, 2.0) for documents in SIZES]
    assert tokens == sorted(tokens)
    steps = [steps_of(documents, mean) for documents in SIZES]
    assert all(later >= 0.75 * earlier for earlier, later in pairwise(steps)), "but for rounding"


@pytest.mark.parametrize("documents", [40, 100, 300, 1000])
@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.0, 10.0])
def test_a_training_gets_enough_steps_where_it_has_the_documents(documents: int, epochs: float) -> None:
    found = steps_of(documents, 160, epochs)
    assert found >= min(0.9 * MIN_TOTAL_STEPS, 0.9 * epochs * documents)


@pytest.mark.parametrize(
    ("documents", "mean", "longest"),
    [(124, 16.3, 23), (1636, 13.0, 40), (5452, 13.0, 40), (300, 17.8, 64), (9002, 18.3, 64)],
    ids=["shop messages", "TREC, 1,636 rows", "TREC", "banking77, 300 rows", "banking77"],
)
def test_short_texts_to_classify_get_steps_of_a_few_documents(documents: int, mean: float, longest: int) -> None:
    """A fixed number of tokens gave 1,636 questions six steps. Usual recipes take about 32 documents a step."""
    tokens = round(documents * mean)
    step = auto_tokens_per_step(documents, tokens, longest, 2.0)
    assert step / mean < 32
    assert 2 * tokens / step > 80


def test_a_step_holds_the_longest_document_and_is_bounded() -> None:
    assert auto_tokens_per_step(300, 6000, 500, 2.0) == 512
    assert auto_tokens_per_step(10**8, 10**11, 10**6, 2.0) == math.ceil(10**6 / 16) * 16, "the longest document goes before"
    assert auto_tokens_per_step(0, 0, 0, 1.0) == 16


def test_a_number_of_the_spec_is_taken_as_it_is(job: Any, data: Any) -> None:
    spec = job(train={"tokens_per_step": 1000}).spec
    assert tokens_per_step(spec, data(tokens_per_step=64)) == 1000
    assert estimate_data_size(4000, 100, spec).tokens_per_step == 1000


def test_what_the_data_was_measured_with_counts(job: Any, data: Any) -> None:
    spec = job().spec
    assert spec.train.tokens_per_step == "auto"
    assert tokens_per_step(spec, data(tokens_per_step=4321)) == 4321
    assert tokens_per_step(spec, data()) == auto_tokens_per_step(1000, 400_000, 512, 2.0)


def test_an_estimate_from_file_sizes_comes_to_as_many_steps(job: Any) -> None:
    """English text has more than four bytes a token under one vocabulary and fewer under another: documents are counted."""
    spec = job().spec
    estimated = estimate_data_size(375 * 120, 375, spec)
    for mean in (20, 30, 45):
        exact = auto_tokens_per_step(300, 300 * mean, mean, spec.train.epochs)
        assert total_steps(spec, estimated) == pytest.approx(2 * 300 * mean / exact, rel=0.15)


def test_long_rows_are_estimated_as_what_is_left_of_them(job: Any) -> None:
    spec = job(data={"max_tokens": 64}).spec
    assert estimate_data_size(1_000_000, 100, spec).train_tokens == 80 * 64
    text = job(task="text", data={"max_tokens": 64}).spec
    chunked = estimate_data_size(1_000_000, 100, text)
    assert (chunked.train_tokens, chunked.train_documents) == (200_000, 3126)


def plan_of(job: Any, base: Any, cores: Any, size: DataSize, **sections: Any) -> Any:
    return make_plan(job(**sections), base("tiny"), size, cores(), job="sweep", spec_sha256="0" * 64)


def test_the_plan_says_how_auto_came_about(job: Any, base: Any, cores: Any, data: Any) -> None:
    plan = plan_of(job, base, cores, data(tokens_per_step=1024))
    assert plan.reasons[0] == "tokens_per_step: auto: 1000 documents of 400 tokens -> 1024 tokens per step -> 90 steps"
    guessed = plan_of(job, base, cores, data(tokens_per_step=1024, exact=False))
    assert "400 tokens (estimated) ->" in guessed.reasons[0]
    assert not any("auto:" in reason for reason in plan_of(job, base, cores, data(), train={"tokens_per_step": 8192}).reasons)


@pytest.mark.parametrize(
    ("size", "sections", "said"),
    [
        (
            {"train_documents": 240, "train_tokens": 7000, "steps_per_epoch": 1, "longest_document_tokens": 60},
            {"train": {"tokens_per_step": 8192}},
            "2 optimizer steps: with fewer than 30 a model learns little and trials cannot be compared well: "
            "train.tokens_per_step: auto (128 here) gives about 110",
        ),
        (
            {"train_documents": 5, "train_tokens": 100, "steps_per_epoch": 5, "longest_document_tokens": 30},
            {},
            "10 optimizer steps: with fewer than 30 a model learns little and trials cannot be compared well: "
            "train.epochs: 8 gives about 40; "
            "more rows are better",
        ),
    ],
    ids=["steps too large", "too little data"],
)
def test_few_steps_are_warned_of_with_the_remedy(
    job: Any, base: Any, cores: Any, data: Any, size: dict[str, int], sections: dict[str, Any], said: str
) -> None:
    plan = plan_of(job, base, cores, data(**size), **sections)
    assert plan.warnings[0] == f"the whole training is {said}"


def test_enough_steps_are_not(job: Any, base: Any, cores: Any, data: Any) -> None:
    assert not any("optimizer step" in warning for warning in plan_of(job, base, cores, data()).warnings)
    assert too_few_steps_warning(TOO_FEW_STEPS) == ""
    assert too_few_steps_warning(1).startswith("the whole training is one optimizer step:")


@pytest.mark.parametrize(
    ("ranks", "size", "found"),
    [
        (1, {}, None),
        (4, {"tokens_per_step": 1024}, StepSize(4 * 512, 4)),
        (4, {"tokens_per_step": 8192}, StepSize(8192, 4)),
        (64, {"tokens_per_step": 1024}, StepSize(20_000, 64)),
        (4, {"tokens_per_step": 1024, "exact": False}, StepSize(4 * 400, 4)),
    ],
    ids=["one rank", "a document a rank", "large enough", "as many steps as must be", "estimated"],
)
def test_every_rank_has_a_document(job: Any, data: Any, ranks: int, size: dict[str, Any], found: StepSize | None) -> None:
    """1000 documents of 400 tokens, two epochs: 40 steps have 20,000 tokens each."""
    assert filling_step(job().spec, data(**size), ranks) == found
    assert filling_step(job(train={"tokens_per_step": 8192}).spec, data(**size), ranks) is None


def test_a_step_for_several_ranks_is_cut_into_as_many_rows(job: Any, base: Any, data: Any) -> None:
    spec = job(data={"max_tokens": 4096}).spec
    size = data(longest_document_tokens=500, tokens_per_step=8192)
    assert row_tokens(spec, base("tiny"), size) == 4096
    assert row_tokens(spec, base("tiny"), size.with_step(8192, 8)) == 1024
    assert row_tokens(spec, base("tiny"), size.with_step(8192, 32)) == 504, "the longest document"
