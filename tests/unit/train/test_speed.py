"""Steady speed: the slow first steps do not count."""

from __future__ import annotations

import pytest

from orchestrator.train.loop import SteadySpeed
from orchestrator.work.results import StepReport


def step(number: int, tokens: int, tokens_per_s: float) -> StepReport:
    return StepReport(
        step=number,
        epoch=0,
        tokens=tokens,
        supervised_tokens=1,
        loss=1.0,
        loss_hex=(1.0).hex(),
        learning_rate=1.0,
        grad_norm=1.0,
        tokens_per_s=tokens_per_s,
        memory_bytes=1,
    )


def test_tokens_by_seconds_after_the_first_two_steps() -> None:
    speed = SteadySpeed(1000)
    speed.add(step(11, 1100, 1.0))
    speed.add(step(12, 1200, 2.0))
    assert speed.tokens_per_s is None
    speed.add(step(13, 1300, 100.0))
    speed.add(step(14, 1600, 50.0))
    assert speed.tokens_per_s == pytest.approx(400 / 7)
