from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.train.loop import learning_rate_at, step_learning_rate
from orchestrator.work.execution import TrainSettings


def settings(schedule: str, warmup: float = 0.1) -> TrainSettings:
    values = {"warmup": warmup, "schedule": schedule, "weight_decay": 0.0, "grad_clip": 1.0, "tokens_per_step": 10}
    return TrainSettings.model_validate(values)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0.0, 50: 0.5, 100: 1.0, 550: 0.5, 1000: 0.0, 2000: 0.0}),
        ("cosine", {0: 0.0, 50: 0.5, 100: 1.0, 325: 0.8535534, 550: 0.5, 1000: 0.0, 2000: 0.0}),
        ("constant", {0: 0.0, 50: 0.5, 100: 1.0, 550: 1.0, 1000: 1.0}),
    ],
)
def test_rises_by_tokens_and_falls(schedule: str, expected: dict[int, float]) -> None:
    for tokens, rate in expected.items():
        assert learning_rate_at(tokens, total_tokens=1000, peak=1.0, settings=settings(schedule)) == pytest.approx(rate)


def test_no_step_is_wasted() -> None:
    """Ten steps of 100 tokens: the first and the last have a learning rate too."""
    rates = [
        step_learning_rate(100 * step, 100, total_tokens=1000, peak=2.0, settings=settings("linear", 0.2)) for step in range(10)
    ]
    assert all(rate > 0 for rate in rates)
    assert rates == pytest.approx([0.5, 1.5, *(2.0 * (1 - (50 + 100 * step - 200) / 800) for step in range(2, 10))])


@given(st.floats(0, 2000), st.sampled_from(["linear", "cosine", "constant"]), st.floats(0, 0.99), st.floats(1e-6, 1.0))
def test_never_above_the_peak_nor_below_zero(tokens: float, schedule: str, warmup: float, peak: float) -> None:
    rate = learning_rate_at(tokens, total_tokens=1000, peak=peak, settings=settings(schedule, warmup))
    assert 0.0 <= rate <= peak * (1 + 1e-12)
