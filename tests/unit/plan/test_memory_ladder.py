"""The steps down when memory runs out: each smaller, the documents of a step untouched, and an end."""

from __future__ import annotations

import pytest

from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.memory_ladder import MemoryLadder, SmallerExecution, beyond_the_gang, no_larger_than

ALONE = ExecutionPlan(device="cuda", ranks=1, threads_per_rank=1, executor="torch", row_tokens=64, micro_batch_rows=6)
TWO_WHOLE = ALONE.model_copy(update={"ranks": 2})
TWO = ALONE.model_copy(update={"ranks": 2, "executor": "deepspeed", "zero_stage": 1})


def steps_down(execution: ExecutionPlan) -> list[tuple[int, bool, int]]:
    """(rows, checkpointing, stage) of every step."""
    found = []
    changed = {"micro_batch_rows", "checkpointing", "zero_stage"}
    while isinstance(smaller := MemoryLadder().step(execution, "out of memory"), SmallerExecution):
        assert smaller.execution.model_dump(exclude=changed) == execution.model_dump(exclude=changed)
        execution = smaller.execution
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
    ("replaced", "note"),
    [
        ("", "out of memory: restarted with 3 rows per micro-batch and more accumulation rounds"),
        (
            "worker group",
            "out of memory: the worker group was replaced and the trial restarted with 3 rows per micro-batch and more "
            "accumulation rounds",
        ),
    ],
)
def test_a_step_has_a_note_of_what_was_replaced(replaced: str, note: str) -> None:
    smaller = MemoryLadder(replaced).step(ALONE, "out of memory on rank 1")
    assert isinstance(smaller, SmallerExecution)
    assert smaller.note == note


def test_the_end_of_the_ladder_is_a_failure_with_a_remedy() -> None:
    smallest = TWO.model_copy(update={"micro_batch_rows": 1, "checkpointing": True, "zero_stage": 2})
    failure = MemoryLadder("gang").step(smallest, "out of memory on rank 1")
    assert isinstance(failure, Failure)
    assert failure.kind == "out_of_memory"
    assert failure.remedy == beyond_the_gang(smallest)
    assert str(failure).splitlines()[0].startswith("out of memory on rank 1; ")
    assert str(failure).splitlines()[-1] == f"  to do: {failure.remedy}"


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
    reduced = TWO.model_copy(update={"micro_batch_rows": 1, "checkpointing": True, "zero_stage": 2})
    assert no_larger_than(TWO, None) == TWO
    assert no_larger_than(TWO, reduced) == reduced
    assert no_larger_than(TWO.model_copy(update={"threads_per_rank": 8}), reduced).threads_per_rank == 8
    leaner = TWO.model_copy(update={"micro_batch_rows": 2})
    assert no_larger_than(leaner, TWO).micro_batch_rows == 2


@pytest.mark.parametrize("values", [{"ranks": 4}, {"device": "cpu"}, {"zero_stage": 3}, {"offload": "optimizer"}])
def test_a_gang_of_another_kind_starts_as_planned(values: dict[str, object]) -> None:
    planned = TWO.model_copy(update=values)
    assert no_larger_than(planned, TWO.model_copy(update={"micro_batch_rows": 1})) == planned
