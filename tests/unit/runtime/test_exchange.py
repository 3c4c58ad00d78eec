"""The exchange's answers: nothing known is computed again, and what is most urgent is served first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.run.ledger import Ledger
from orchestrator.transfer.run_view import Activity
from tests.unit.runtime.exchange_bench import RUNGS, Bench, ScriptedGang, at_once, first_rungs


def test_the_exchange_says_what_each_gang_is_doing(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        async def until_any() -> Activity:
            while not (found := await bench.exchange.activities()):
                await asyncio.sleep(0.01)
            return found[0]

        ScriptedGang.gate.clear()
        ScriptedGang.go.clear()
        call = asyncio.create_task(bench.advance(bench.trial(0)))
        assert await until_any() == Activity(doing="waiting for 1 free core", gang=0)
        ScriptedGang.gate.set()
        while (await until_any()).doing != "training":
            await asyncio.sleep(0.01)
        total = bench.trial(0).total_steps
        assert await until_any() == Activity(doing="training", gang=0, trial_id="t0", stop_step=4, total_steps=total)
        begun = [item["record"] for item in bench.exchange._news if item["kind"] == "trial"]
        assert [(record.trial_id, record.state, record.last) for record in begun] == [("t0", "running", None)], (
            "told as it begins"
        )
        ScriptedGang.go.set()
        await call
        assert await bench.exchange.activities() == (), "an idle gang is doing nothing"

    on_bench(scene)


def test_what_is_known_is_answered_without_a_gang(on_bench: Callable[..., list[Any]]) -> None:
    async def first(bench: Bench) -> None:
        for rung in (0, 1):
            await bench.advance(bench.trial(0), rung)
        await bench.exchange.finish("t0", "stopped")

    async def second(bench: Bench) -> None:
        answers = [await bench.advance(bench.trial(0), rung) for rung in (0, 1, 2)]
        assert [answer.step for answer in answers] == [4, 12, 12]
        assert [answer.ended for answer in answers] == [False, True, True]
        assert bench.told() == []

    assert len(on_bench(first)) == 2
    assert on_bench(second) == []


def test_a_failure_of_the_untouched_base_is_not_kept(on_bench: Callable[..., list[Any]]) -> None:
    """Nothing can be compared without it: whoever submits again has it evaluated again."""

    async def broken(bench: Bench) -> None:
        ScriptedGang.broken = {"none", "t0"}
        answer = await bench.advance(bench.none())
        assert (answer.state, answer.reason, answer.ended) == ("failed", "it broke", True)
        await bench.exchange.finish("none", "failed")
        assert (await bench.advance(bench.trial(0))).state == "failed"

    async def mended(bench: Bench) -> None:
        assert (await bench.advance(bench.none())).state == "done"
        assert (await bench.advance(bench.trial(0))).state == "failed", "a trial's own failure is a result"

    assert [assignment.trial.trial_id for assignment in on_bench(broken)] == ["none", "t0"]
    assert [assignment.trial.trial_id for assignment in on_bench(mended)] == ["none"]


def test_a_rung_starts_where_the_one_before_ended(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        for rung in range(len(RUNGS)):
            await bench.advance(bench.trial(0), rung)

    first, second, last = on_bench(scene)
    assert first.start is None
    assert second.start == f"{first.folder}/rung-0"
    assert last.start == f"{first.folder}/rung-1"
    assert [assignment.keep_optimizer for assignment in (first, second, last)] == [True, True, False]


def test_the_base_is_served_first_then_the_higher_rungs(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        await bench.advance(bench.trial(0))
        ScriptedGang.gate.clear()
        ScriptedGang.deaths["t1"] = 1
        calls = [asyncio.create_task(bench.advance(bench.trial(1)))]
        while "gang_died" not in bench.told():
            await asyncio.sleep(0)
        calls += [asyncio.create_task(call) for call in (bench.advance(bench.trial(2)), bench.advance(bench.trial(0), 1))]
        calls += [asyncio.create_task(bench.advance(bench.none()))]
        await asyncio.sleep(0)
        ScriptedGang.gate.set()
        await asyncio.gather(*calls)

    ran = on_bench(scene)
    assert [assignment.work_id for assignment in ran] == ["t0", "t1", "none", "t0", "t1", "t2"]


def test_a_result_that_cannot_be_written_is_heard_of(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        (bench.folder / "t0" / "result-0.json").mkdir(parents=True)
        with pytest.raises(OSError, match="result-0"):
            await bench.advance(bench.trial(0))
        assert (await bench.advance(bench.trial(1))).state == "done"

    assert len(on_bench(scene)) == 2


def test_an_estimate_that_fails_is_no_trials_failure(on_bench: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def hear(*_: object) -> None:
        raise ZeroDivisionError

    async def scene(bench: Bench) -> None:
        monkeypatch.setattr(bench.exchange._first_steps, "_estimate", hear)
        assert (await bench.advance(bench.trial(0))).state == "done"

    on_bench(scene)


def test_a_trial_that_is_ended_releases_its_caller(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.gate.clear()
        call = asyncio.create_task(bench.advance(bench.trial(0)))
        await asyncio.sleep(0.01)
        await bench.exchange.finish("t0", "stopped", "not needed")
        assert (await call).ended
        ScriptedGang.gate.set()
        assert (await bench.advance(bench.trial(1))).state == "done"

    assert [assignment.trial.trial_id for assignment in on_bench(scene)] == ["t1"]


def test_a_gang_gets_first_what_it_may_remember(on_bench: Callable[..., list[Any]]) -> None:
    """Of what is equally urgent: a higher rung of another gang still comes before."""

    async def scene(bench: Bench) -> None:
        ScriptedGang.go.clear()
        calls = await at_once(bench, first_rungs(bench, 2))
        await asyncio.sleep(0.01)
        ScriptedGang.go.set()
        await asyncio.gather(*calls)
        homes = [entry.results[-1].gang for entry in Ledger(bench.folder).entries()]
        ScriptedGang.go.clear()
        blockers = [asyncio.create_task(bench.advance(bench.trial(number))) for number in (7, 8)]
        await asyncio.sleep(0.01)
        again = [asyncio.create_task(bench.advance(bench.trial(number), 1)) for number in (1, 0)]
        await asyncio.sleep(0.01)
        ScriptedGang.go.set()
        await asyncio.gather(*blockers, *again)
        assert sorted(homes) == [0, 1]
        assert [entry.results[-1].gang for entry in Ledger(bench.folder).entries()][:2] == homes

    on_bench(scene, gangs=2)
