"""The steps down when memory runs out: each smaller, the documents of a step untouched, and an end."""

from __future__ import annotations

import pytest

from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.memory_ladder import beyond_the_gang, relieve, with_relief

ALONE = ExecutionPlan(device="cuda", ranks=1, threads_per_rank=1, executor="torch", row_tokens=64, micro_batch_rows=6)
TWO_WHOLE = ALONE.model_copy(update={"ranks": 2})
TWO = ALONE.model_copy(update={"ranks": 2, "executor": "deepspeed", "zero_stage": 1})


def steps_down(execution: ExecutionPlan) -> list[tuple[int, bool, int]]:
    """(rows, checkpointing, stage) of every step."""
    found = []
    changed = {"micro_batch_rows", "checkpointing", "zero_stage"}
    while (relief := relieve(execution)) is not None:
        assert relief.execution.model_dump(exclude=changed) == execution.model_dump(exclude=changed)
        execution = relief.execution
        found.append((execution.micro_batch_rows, execution.checkpointing, execution.zero_stage))
    return found


def test_rows_first_then_checkpointing_then_the_stage() -> None:
    assert steps_down(ALONE) == steps_down(TWO_WHOLE) == [(3, False, 0), (1, False, 0), (1, True, 0)]
    assert steps_down(TWO) == [(3, False, 1), (1, False, 1), (1, True, 1), (1, True, 2)]
    assert steps_down(TWO.model_copy(update={"zero_stage": 0}))[-2:] == [(1, True, 1), (1, True, 2)]


def test_what_parts_the_base_otherwise_is_another_plan() -> None:
    """A gang that holds the base whole cannot go to ZeRO-3, and one rank has nobody to share with."""
    assert steps_down(TWO.model_copy(update={"zero_stage": 3}))[-1] == (1, True, 3)
    assert steps_down(ALONE.model_copy(update={"executor": "deepspeed"}))[-1] == (1, True, 0)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"executor": "torch", "ranks": 1}, "resources.ranks_per_gang: 2 with zero: 3"),
        ({"executor": "torch", "zero_stage": 0}, "resources.zero: 3"),
        ({"zero_stage": 2}, "resources.zero: 3"),
        ({"zero_stage": 3}, "resources.offload: optimizer"),
        ({"zero_stage": 3, "offload": "optimizer"}, "resources.offload: parameters"),
        ({"zero_stage": 3, "offload": "parameters"}, "more ranks than 2"),
        ({"zero_stage": 3, "device": "cpu"}, "more ranks than 2"),
    ],
)
def test_the_rung_after_the_last_step_is_named(values: dict[str, object], remedy: str) -> None:
    assert beyond_the_gang(TWO.model_copy(update=values)).startswith(remedy)


def test_a_trial_never_starts_larger_than_it_came_down_to() -> None:
    relieved = TWO.model_copy(update={"micro_batch_rows": 1, "checkpointing": True, "zero_stage": 2})
    assert with_relief(TWO, None) == TWO
    assert with_relief(TWO, relieved) == relieved
    assert with_relief(TWO.model_copy(update={"threads_per_rank": 8}), relieved).threads_per_rank == 8
    leaner = TWO.model_copy(update={"micro_batch_rows": 2})
    assert with_relief(leaner, TWO).micro_batch_rows == 2


@pytest.mark.parametrize("values", [{"ranks": 4}, {"device": "cpu"}, {"zero_stage": 3}, {"offload": "optimizer"}])
def test_a_gang_of_another_kind_starts_as_planned(values: dict[str, object]) -> None:
    planned = TWO.model_copy(update=values)
    assert with_relief(planned, TWO.model_copy(update={"micro_batch_rows": 1})) == planned
