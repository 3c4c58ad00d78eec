"""Rungs, rows and rounds."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from orchestrator.errors import PlanError
from orchestrator.plan import rung_steps
from orchestrator.plan.schedule import accumulation, max_rows, row_tokens, total_steps, total_tokens


@pytest.mark.parametrize(
    ("steps", "budget", "scheduler", "rungs"),
    [
        (90, 1.0, "asha", (10, 30, 90)),
        (91, 1.0, "asha", (11, 31, 91)),
        (90, 0.5, "asha", (5, 15, 45)),
        (30, 1.0, "asha", (4, 10, 30)),
        (20, 1.0, "asha", (7, 20)),
        (9, 1.0, "asha", (9,)),
        (1, 1.0, "asha", (1,)),
        (90, 1.0, "none", (90,)),
        (90, 0.01, "asha", (1,)),
    ],
)
def test_rungs(steps: int, budget: float, scheduler: Literal["asha", "none"], rungs: tuple[int, ...]) -> None:
    assert rung_steps(steps, budget=budget, scheduler=scheduler) == rungs


def test_more_rungs_begin_sooner() -> None:
    found = {count: rung_steps(96, max_rungs=count) for count in (1, 2, 3, 4, 9)}
    assert found == {1: (96,), 2: (32, 96), 3: (11, 32, 96), 4: (4, 11, 32, 96), 9: (4, 11, 32, 96)}


def test_the_budget_is_rounded_up(job: Any, data: Any) -> None:
    spec = job(train={"epochs": 0.5}).spec
    assert total_steps(spec, data(steps_per_epoch=45)) == 23
    assert total_tokens(spec, data(train_tokens=1001)) == 501
    assert total_steps(spec, data(steps_per_epoch=0)) == 1


@pytest.mark.parametrize(
    ("max_tokens", "pack", "task", "longest", "width"),
    [
        (512, True, "completion", 300, 512),
        (510, True, "completion", 300, 512),
        (512, False, "completion", 300, 304),
        (512, True, "classify", 61, 64),
        (512, False, "completion", 900, 512),
    ],
)
def test_row_width(base: Any, job: Any, data: Any, max_tokens: int, pack: bool, task: str, longest: int, width: int) -> None:
    spec = job(task=task, data={"max_tokens": max_tokens, "pack": pack}).spec
    assert row_tokens(spec, base("tiny"), data(longest_document_tokens=longest)) == width


def test_a_document_longer_than_the_positions_is_refused(base: Any, job: Any, data: Any) -> None:
    spec = job(data={"max_tokens": 10_000}).spec
    with pytest.raises(PlanError, match="9000 tokens, but the base has only 8192 positions") as caught:
        row_tokens(spec, base("tiny"), data(longest_document_tokens=9000))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("width", "ranks", "tokens", "device", "rows"),
    [
        (512, 1, 8192, "cuda", 16),
        (512, 4, 8192, "cuda", 4),
        (512, 1, 8192, "cpu", 8),
        (512, 64, 8192, "cuda", 1),
        (8192, 1, 8192, "cpu", 1),
    ],
)
def test_most_rows(width: int, ranks: int, tokens: int, device: Literal["cpu", "cuda"], rows: int) -> None:
    assert max_rows(width, ranks, tokens, device) == rows


def test_rounds_hold_a_full_step() -> None:
    assert accumulation(8, 512, 1, 8192) == 2
    assert accumulation(3, 512, 2, 8192) == 3
    assert accumulation(64, 512, 4, 8192) == 1


def test_an_image_takes_all_positions_of_its_base(base: Any, job: Any, data: Any) -> None:
    """A base without a vocabulary reads images: patches and one more, whatever `max_tokens` says."""
    vision = base("tiny").model_copy(update={"vocab_size": 0, "max_positions": 197})
    for longest, most in ((1, 64), (512, 2048)):
        spec = job(task="classify", data={"max_tokens": most}).spec
        assert row_tokens(spec, vision, data(longest_document_tokens=longest)) == 197
