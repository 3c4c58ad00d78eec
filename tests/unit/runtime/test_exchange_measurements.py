"""Measurements go through the exchange as other work does, outside the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.run.ledger import Ledger
from orchestrator.work.assignment import ScoreBlocks
from orchestrator.work.measurements import LayerScores, ProbePlan
from tests.unit.runtime.exchange_bench import Bench


def probe_of(bench: Bench) -> ScoreBlocks:
    context = bench.exchange._context
    return ScoreBlocks(context=context, execution=bench.plan.execution, seed=0, plan=ProbePlan(num_batches=4, rows=2))


def test_a_probe_goes_through_the_queue_and_leaves_nothing_in_the_ledger(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        result = await bench.exchange.measure(probe_of(bench))
        assert result.found == LayerScores()
        assert Ledger(bench.folder).entries() == []
        assert (await bench.advance(bench.trial(0))).state == "done"

    ran = on_bench(scene, deaths={"probe": 1})
    assert [assignment.work_id for assignment in ran] == ["probe", "probe", "t0"]


def test_a_probe_that_kills_every_gang_is_a_failed_result(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        result = await bench.exchange.measure(probe_of(bench))
        assert "gangs died" in result.found.failed
        assert (await bench.advance(bench.trial(0))).state == "done", "the search goes on"

    on_bench(scene, deaths={"probe": 99})


def test_a_probe_is_not_held_back_for_want_of_hours(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        await bench.advance(bench.none())
        assert await bench.exchange.is_spent()
        assert (await bench.exchange.measure(probe_of(bench))).found == LayerScores()

    on_bench(scene, max_gpu_hours=1.0)


def test_later_work_is_made_by_the_resolved_plan(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        resolved = bench.plan.model_copy(update={"name": "resolved"})
        await bench.exchange.replan(resolved)
        assert bench.exchange._orders.plan == bench.exchange._first_steps._plan == resolved

    on_bench(scene)
