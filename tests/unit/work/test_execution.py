"""Which executions the same gang can run, one after another."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.memory_ladder import no_larger_than

PLANNED = ExecutionPlan(
    device="cpu", ranks=2, threads_per_rank=1, executor="deepspeed", zero_stage=1, row_tokens=64, micro_batch_rows=4
)


def changed(**update: Any) -> ExecutionPlan:
    return PLANNED.model_copy(update=update)


@pytest.mark.parametrize(
    "update", [{"micro_batch_rows": 1}, {"checkpointing": True}, {"zero_stage": 2}, {"compiled": True}, {"threads_per_rank": 3}]
)
def test_a_gang_can_use_less_memory_without_being_another(update: dict[str, Any]) -> None:
    assert changed(**update).gang_kind == PLANNED.gang_kind


@pytest.mark.parametrize(
    "update",
    [
        {"zero_stage": 3},
        {"ranks": 1},
        {"device": "cuda"},
        {"executor": "torch"},
        {"dtype": "float32"},
        {"offload": "optimizer"},
        {"row_tokens": 32},
        {"pack": False},
    ],
)
def test_another_kind_of_gang_starts_as_planned(update: dict[str, Any]) -> None:
    smaller = {"micro_batch_rows": 1, "checkpointing": True}
    assert changed(**update).gang_kind != PLANNED.gang_kind
    assert no_larger_than(PLANNED, changed(**update, **smaller)) == PLANNED
    assert no_larger_than(PLANNED, changed(zero_stage=2, **smaller)) == changed(zero_stage=2, **smaller)
