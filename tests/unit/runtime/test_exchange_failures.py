"""Gangs that fail, run out of memory or cannot start: work is never lost, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.errors import TrainingError
from orchestrator.plan.values import RunPlan
from orchestrator.run.ledger import Ledger
from orchestrator.runtime.assignments import MAX_ATTEMPTS
from tests.unit.runtime.exchange_bench import Bench, ScriptedGang, rows_of


def test_what_a_dead_gang_was_doing_is_done_by_the_next(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        assert (await bench.advance(bench.trial(0))).state == "done"
        (figures,) = await bench.exchange.figures()
        assert (figures.replaced, figures.base_loads) == (1, 2)
        assert bench.told() == ["gang_ready", "gang_died", "gang_ready"]

    assert len(on_bench(scene, deaths={"t0": 1})) == 2


def test_a_trial_that_kills_every_gang_fails_and_the_others_go_on(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        deadly, harmless = await asyncio.gather(bench.advance(bench.trial(0)), bench.advance(bench.trial(1)))
        assert (deadly.state, deadly.ended, harmless.state) == ("failed", True, "done")
        entry = Ledger(bench.folder).get("t0")
        assert entry is not None
        assert entry.end is not None
        assert "gangs died" in entry.end.reason
        (result,) = entry.results
        assert result.failure is not None
        assert (result.failure.kind, result.ran_out_of_memory) == ("gang", False)

    ran = on_bench(scene, deaths={"t0": 99})
    assert [assignment.work_id for assignment in ran].count("t0") == MAX_ATTEMPTS


def test_a_gang_that_ran_out_of_memory_is_followed_by_one_with_half_the_rows(
    on_bench: Callable[..., list[Any]], plan: RunPlan
) -> None:
    """Such deaths are no attempts; what it came down to holds for the trial's later rungs, and for nobody else's."""
    assert plan.execution.micro_batch_rows == 8

    async def first(bench: Bench) -> None:
        ScriptedGang.fitting = {"t0": 1}
        ScriptedGang.deaths = {"t0": MAX_ATTEMPTS - 1}
        assert (await bench.advance(bench.trial(0))).state == "done"
        assert (await bench.advance(bench.trial(1))).state == "done"
        assert (await bench.advance(bench.trial(0), 1)).state == "done"
        died = [item for item in bench.exchange._news if item["kind"] == "gang_died"]
        assert [item["trial_id"] for item in died] == ["t0"] * (3 + MAX_ATTEMPTS - 1)
        assert "restarted with 4 rows" in died[MAX_ATTEMPTS - 1]["message"]
        notes = [item["message"] for item in bench.exchange._news if item["kind"] == "trial_note"]
        assert len(notes) == 3, "they are told once, and not again with the next rung"

    async def again(bench: Bench) -> None:
        entry = Ledger(bench.folder).get("t0")
        assert entry is not None
        assert [len(result.notes) for result in entry.results] == [3, 0]
        assert (await bench.advance(bench.trial(0), 2)).state == "done"

    assert rows_of(on_bench(first)) == [8] * MAX_ATTEMPTS + [4, 2, 1, 8, 1]
    assert rows_of(on_bench(again)) == [1], "a later submission knows it too"


def test_a_trial_that_fits_no_gang_fails_and_the_others_go_on(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.fitting = {"t0": 0}
        large, small = await asyncio.gather(bench.advance(bench.trial(0)), bench.advance(bench.trial(1)))
        assert (large.state, large.ended, small.state) == ("failed", True, "done")
        assert "out of memory on rank 1; memory use cannot be reduced further" in large.reason
        assert "resources.ranks_per_gang" in large.reason
        entry = Ledger(bench.folder).get("t0")
        assert entry is not None
        assert entry.results[-1].failed_for_memory

    ran = on_bench(scene)
    tried = [(a.execution.micro_batch_rows, a.execution.checkpointing) for a in ran if a.trial.trial_id == "t0"]
    assert tried == [(8, False), (4, False), (2, False), (1, False), (1, True)]


def test_a_gang_that_cannot_even_be_ended_leaves_nobody_waiting(
    on_bench: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself is gone, say: what is told comes before what may raise."""

    def refuse(_: ScriptedGang) -> None:
        raise OSError("no Ray")

    async def scene(bench: Bench) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(ScriptedGang, "kill", refuse)
            for number in (0, 1):
                with pytest.raises(TrainingError, match="no Ray"):
                    await bench.advance(bench.trial(number))
        assert bench.told() == ["gang_failed_to_start", "gang_lost"]

    assert on_bench(scene, dead_starts=99) == []


@pytest.mark.parametrize("gangs", [1, 2])
def test_whoever_waits_hears_that_no_gang_can_be_started(on_bench: Callable[..., list[Any]], gangs: int) -> None:
    async def scene(bench: Bench) -> None:
        for number in (0, 1):
            with pytest.raises(TrainingError, match="no room"):
                await bench.advance(bench.trial(number))

    assert on_bench(scene, dead_starts=99, gangs=gangs) == []


def test_a_gang_that_finds_no_place_in_time_says_so(on_bench: Callable[..., list[Any]]) -> None:
    """The text of a timeout is empty."""

    async def scene(bench: Bench) -> None:
        ScriptedGang.refusal = TimeoutError()
        with pytest.raises(TrainingError, match="no gang could be started: no place within 600 s"):
            await bench.advance(bench.trial(0))
        said = [item["message"] for item in bench.exchange._news if item["kind"] == "gang_failed_to_start"]
        assert said == ["gang 0 could not start: no place within 600 s"] * MAX_ATTEMPTS

    assert on_bench(scene, dead_starts=99) == []


def test_a_gang_that_starts_late_is_no_failure(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        assert (await bench.advance(bench.trial(0))).state == "done"

    assert len(on_bench(scene, dead_starts=MAX_ATTEMPTS - 1)) == 1
