"""What a free gang takes: no more than its even part, no more than pays, and nothing that must run alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan import make_trial, train_rung, work_context
from orchestrator.plan.values import RunPlan
from orchestrator.runtime import work_queue as queue
from orchestrator.runtime.assignments import QueuedWork
from orchestrator.runtime.work_queue import WorkQueue
from orchestrator.work.assignment import TrainRung
from orchestrator.work.execution import DataPaths, TrainSettings
from orchestrator.work.failure import Failure
from orchestrator.work.results import EngineRecord, RungResult, WorkResult

SETTINGS = TrainSettings(warmup=0, schedule="constant", weight_decay=0, grad_clip=0, tokens_per_step=512)


class Bench:
    """A queue, and work for it: trials of the plan's options, by number."""

    def __init__(self, plan: RunPlan, anatomy: ModelAnatomy, num_gangs: int, max_fused: int) -> None:
        self.plan = plan.model_copy(update={"search": plan.search.model_copy(update={"max_fused": max_fused})})
        self.options = plan.search.options
        self.queue = WorkQueue(self.plan, anatomy, num_gangs)

    def put(self, number: int, option: int = 0, attempts: int = 0, home: int | None = None) -> None:
        trial = make_trial(self.plan, self.options[option], 1e-3, number, seed=0).model_copy(update={"trial_id": f"t{number}"})
        data, selection = DataPaths(train="train.npz", eval="eval.npz"), self.options[option].selection
        context = work_context(self.plan, settings=SETTINGS, data=data, metric="loss")
        assignment = train_rung(self.plan, context, trial, selection, folder=trial.trial_id, stop_step=4)
        future: asyncio.Future[WorkResult | None] = asyncio.get_running_loop().create_future()
        self.queue.put(QueuedWork((1, 0, number), assignment, future, attempts, home=home))

    async def take(self, stack: AsyncExitStack, gang: int | None = None) -> list[QueuedWork]:
        return await asyncio.wait_for(stack.enter_async_context(self.queue.next_group(gang)), 5)

    async def done(self, gang: int | None = None) -> list[int]:
        """What one gang takes, which is free again at once."""
        async with AsyncExitStack() as stack:
            return numbers(await self.take(stack, gang))


def rung_of(work: QueuedWork) -> TrainRung:
    assert isinstance(work.assignment, TrainRung)
    return work.assignment


def numbers(group: Sequence[QueuedWork]) -> list[int]:
    return [rung_of(work).trial.number for work in group]


def served(group: Sequence[QueuedWork], widths: Sequence[int]) -> list[RungResult]:
    """Results by how many trials shared their batches."""
    engine = EngineRecord.model_construct(fused_trials=1)
    return [
        rung_of(work)
        .failed(Failure(kind="training", message=""))
        .model_copy(update={"engine": engine.model_copy(update={"fused_trials": width})})
        for work, width in zip(group, widths, strict=True)
    ]


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scene)


@pytest.mark.parametrize(
    ("num_gangs", "max_fused", "count", "taken"),
    [
        (1, 4, 6, [4]),
        (1, 8, 6, [6]),
        (1, 1, 6, [1]),
        (2, 4, 6, [3, 3]),
        (2, 4, 5, [3, 2]),
        (2, 2, 5, [2, 2]),
        (3, 8, 4, [2, 1, 1]),
        (4, 8, 3, [1, 1, 1]),
    ],
)
def test_no_gang_takes_more_than_its_even_part(
    plan: RunPlan, anatomy: ModelAnatomy, num_gangs: int, max_fused: int, count: int, taken: list[int]
) -> None:
    async def scene() -> None:
        bench = Bench(plan, anatomy, num_gangs, max_fused)
        for number in range(count):
            bench.put(number)
        async with AsyncExitStack() as stack:
            assert [len(await bench.take(stack)) for _ in taken] == taken

    play(scene())


def test_a_gang_that_works_or_is_lost_is_left_nothing(plan: RunPlan, anatomy: ModelAnatomy) -> None:
    async def scene() -> None:
        bench = Bench(plan, anatomy, 3, 8)
        bench.queue.lose_gang()
        bench.put(0)
        async with AsyncExitStack() as stack:
            await bench.take(stack)
            for number in (1, 2, 3):
                bench.put(number)
            assert await bench.done() == [1, 2, 3]
        for number in (4, 5, 6, 7):
            bench.put(number)
        assert await bench.done() == [4, 5], "it is free again"

    play(scene())


def test_first_things_come_first_and_only_what_is_like_them_comes_with_them(plan: RunPlan, anatomy: ModelAnatomy) -> None:
    """Options 0 and 1 are LoRA and full above one cut, 2 is LoRA above another."""

    async def scene() -> None:
        bench = Bench(plan, anatomy, 1, 8)
        for number, option in enumerate((2, 0, 1, 2, 0, 1)):
            bench.put(number, option)
        assert [await bench.done() for _ in range(4)] == [[0, 3], [1, 4], [2], [5]]

    play(scene())


def test_of_what_is_equally_urgent_a_gang_gets_first_what_it_may_remember(plan: RunPlan, anatomy: ModelAnatomy) -> None:
    async def scene() -> None:
        alone = Bench(plan, anatomy, 1, 1)
        for number, home in enumerate((0, 1, None, 1)):
            alone.put(number, home=home)
        assert [await alone.done(gang) for gang in (1, 1, 1, 1)] == [[1], [3], [0], [2]]
        shared = Bench(plan, anatomy, 2, 8)
        for number, home in enumerate((0, 1, 0, 1)):
            shared.put(number, home=home)
        async with AsyncExitStack() as stack:
            assert numbers(await shared.take(stack, 1)) == [1, 3]
            assert numbers(await shared.take(stack, 0)) == [0, 2]

    play(scene())


def test_work_of_which_a_gang_died_is_done_alone(plan: RunPlan, anatomy: ModelAnatomy) -> None:
    async def scene() -> None:
        bench = Bench(plan, anatomy, 1, 8)
        for number, attempts in enumerate((0, 1, 0, 1)):
            bench.put(number, attempts=attempts)
        assert [await bench.done() for _ in range(3)] == [[0, 2], [1], [3]]

    play(scene())


@pytest.mark.parametrize(
    ("widths", "later"), [((4, 4, 4, 4), 4), ((2, 2, 2, 2), 2), ((1, 1, 1, 1), 1), ((2, 2, 1), 4), ((1, 1), 1)]
)
def test_where_fewer_pay_later_groups_are_smaller(
    plan: RunPlan, anatomy: ModelAnatomy, widths: tuple[int, ...], later: int
) -> None:
    """Of three, two shared a batch and one did not: nobody has tried four."""

    async def scene() -> None:
        bench = Bench(plan, anatomy, 1, 4)
        for number in range(len(widths)):
            bench.put(number)
        async with AsyncExitStack() as stack:
            group = await bench.take(stack)
        bench.queue.note_fused_size(group, served(group, widths))
        for number in range(10, 14):
            bench.put(number)
        assert len(await bench.done()) == later

    play(scene())


@pytest.mark.parametrize(("rung", "waits"), [(0, True), (1, True), (2, False)])
def test_after_the_last_rung_nobody_is_waited_for(
    plan: RunPlan, anatomy: ModelAnatomy, monkeypatch: pytest.MonkeyPatch, rung: int, waits: bool
) -> None:
    monkeypatch.setattr(queue, "REUNION_S", 0.2)

    async def scene() -> None:
        bench = Bench(plan, anatomy, 1, 4)
        for number in (0, 1):
            bench.put(number)
        async with AsyncExitStack() as stack:
            group = await bench.take(stack)
        bench.queue.expect([result.model_copy(update={"rung": rung}) for result in served(group, (2, 2))])
        bench.put(2)
        began = time.monotonic()
        assert await bench.done() == [2]
        assert (time.monotonic() - began > 0.1) is waits

    play(scene())
