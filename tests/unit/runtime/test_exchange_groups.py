"""Trials that share a batch: each has its own answer, and those that continue share a batch again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.run.ledger import Ledger
from orchestrator.runtime import work_queue as queue
from orchestrator.runtime.assignments import MAX_ATTEMPTS
from tests.unit.runtime.exchange_bench import Bench, ScriptedGang, at_once, first_rungs, rows_of


def test_each_member_of_a_group_has_its_own_answer_and_its_own_failure(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.broken = {"t1"}
        answers = await asyncio.gather(*await at_once(bench, first_rungs(bench, 3)))
        assert [answer.state for answer in answers] == ["done", "failed", "done"]
        ends = [entry.end and entry.end.state for entry in Ledger(bench.folder).entries()]
        assert ends == [None, "failed", None]

    on_bench(scene, max_fused=4)
    assert ScriptedGang.groups == [["t0", "t1", "t2"]]


def test_a_member_whose_result_cannot_be_written_is_heard_of_and_the_others_go_on(
    on_bench: Callable[..., list[Any]],
) -> None:
    async def scene(bench: Bench) -> None:
        (bench.folder / "t0" / "result-0.json").mkdir(parents=True)
        unwritten, written = await at_once(bench, first_rungs(bench, 2))
        with pytest.raises(OSError, match="result-0"):
            await unwritten
        assert (await written).state == "done"

    assert len(on_bench(scene, max_fused=4)) == 2


def test_after_a_death_every_member_goes_on_alone_so_that_the_one_that_kills_is_found(
    on_bench: Callable[..., list[Any]],
) -> None:
    async def scene(bench: Bench) -> None:
        answers = await asyncio.gather(*await at_once(bench, first_rungs(bench, 3)))
        assert [answer.state for answer in answers] == ["done", "failed", "done"]
        assert "gangs died" in answers[1].reason
        (figures,) = await bench.exchange.figures()
        assert figures.replaced == MAX_ATTEMPTS
        told = [item["trial_id"] for item in bench.exchange._news if item["kind"] == "gang_died"]
        assert told == ["t0", "t1", "t2", "t1", "t1"]

    on_bench(scene, deaths={"t1": 99}, max_fused=4)
    assert ScriptedGang.groups == [["t0", "t1", "t2"], ["t0"], ["t1"], ["t1"], ["t2"]]


def test_after_a_death_for_want_of_memory_each_goes_on_smaller_and_alone(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.fitting = {"t1": 4}
        answers = await asyncio.gather(*await at_once(bench, first_rungs(bench, 2)))
        assert [answer.state for answer in answers] == ["done", "done"]

    assert rows_of(on_bench(scene, max_fused=4)) == [8, 8, 4, 4]
    assert ScriptedGang.groups == [["t0", "t1"], ["t0"], ["t1"]]


def test_a_queued_member_that_is_ended_leaves_its_group(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.gate.clear()
        calls = [asyncio.create_task(call) for call in first_rungs(bench, 3)]
        await asyncio.sleep(0.01)
        await bench.exchange.finish("t1", "stopped", "not needed")
        ScriptedGang.gate.set()
        assert [answer.ended for answer in await asyncio.gather(*calls)] == [False, True, False]

    on_bench(scene, max_fused=4)
    assert ScriptedGang.groups == [["t0", "t2"]]


def test_those_of_a_group_that_go_on_share_a_batch_again(
    on_bench: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ask one by one, while something lower waits; one has ended while the group ran, another ends after it."""
    monkeypatch.setattr(queue, "REUNION_S", 99)

    async def scene(bench: Bench) -> None:
        ScriptedGang.go.clear()
        calls = await at_once(bench, [*first_rungs(bench, 4), bench.advance(bench.trial(9))])
        await asyncio.sleep(0.01)
        await bench.exchange.finish("t1", "stopped")
        ScriptedGang.go.set()
        await asyncio.gather(*calls[:4])
        again = []
        for number in (0, 2):
            again.append(asyncio.create_task(bench.advance(bench.trial(number), 1)))
            await asyncio.sleep(0.01)
        assert len(ScriptedGang.groups) == 1, "one of them has not been heard from"
        await bench.exchange.finish("t3", "stopped")
        await asyncio.gather(*again)
        for number in (0, 2):
            await bench.exchange.finish(f"t{number}", "finished")
        await asyncio.gather(*calls)

    on_bench(scene, max_fused=4)
    assert ScriptedGang.groups == [["t0", "t1", "t2", "t3"], ["t0", "t2"], ["t9"]]


def test_nobody_is_waited_for_long_nor_while_the_untouched_base_waits(
    on_bench: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "REUNION_S", 0.2)

    async def scene(bench: Bench) -> None:
        calls = await at_once(bench, first_rungs(bench, 2))
        await asyncio.gather(*calls)
        await asyncio.wait_for(bench.advance(bench.none()), 0.1)
        began = time.monotonic()
        await bench.advance(bench.trial(0), 1)
        assert 0.05 < time.monotonic() - began < 5

    on_bench(scene, max_fused=2)
    assert ScriptedGang.groups == [["t0", "t1"], ["none"], ["t0"]]


def test_without_groups_nobody_waits(on_bench: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "REUNION_S", 99)

    async def scene(bench: Bench) -> None:
        calls = await at_once(bench, first_rungs(bench, 3))
        await asyncio.gather(*calls)
        await asyncio.wait_for(bench.advance(bench.trial(1), 1), 1)

    on_bench(scene)
    assert ScriptedGang.groups == [["t0"], ["t1"], ["t2"], ["t1"]]
