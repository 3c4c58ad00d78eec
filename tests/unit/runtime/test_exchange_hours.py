"""A search whose GPU-hours are used up ends in order, and can go on with more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.ledger import Ledger
from orchestrator.store import commit_folder, read_json, write_json
from tests.unit.runtime.exchange_bench import Bench, ScriptedGang, at_once, first_rungs


def test_when_the_hours_are_used_up_the_search_ends_in_order_and_can_go_on(on_bench: Callable[..., list[Any]]) -> None:
    """Two ranks, an hour an assignment, and a bound of five GPU-hours: three assignments, the last one begun before it."""

    async def first(bench: Bench) -> None:
        calls = [bench.advance(bench.trial(number)) for number in range(5)]
        answers = await asyncio.gather(*calls)
        assert [answer.state for answer in answers] == ["done"] * 3 + ["stopped"] * 2
        assert all(answer.ended for answer in answers[3:])
        assert "max_gpu_hours: 5 is reached: 6 rank-hours used" in answers[3].reason
        assert (await bench.advance(bench.trial(0), 1)).state == "stopped"
        assert (await bench.advance(bench.none())).state == "done", "without the untouched base nothing can be compared"
        new = await bench.advance(bench.trial(9))
        assert (new.state, new.ended) == ("stopped", True)
        assert await bench.exchange.is_spent()
        assert bench.told().count("hours_spent") == 1
        with commit_folder(bench.folder / "t0" / "rung-0") as folder:
            write_json(folder / "state.json", {"has_optimizer": True})
        for number in (0, 3):
            await bench.exchange.finish(f"t{number}", "finished")

    async def as_before(bench: Bench) -> None:
        await bench.exchange._cleaner.join()
        assert read_json(bench.folder / "t0" / "rung-0" / "state.json")["has_optimizer"], "it may go on from there"
        assert (await bench.advance(bench.trial(3))).ended

    async def raised(bench: Bench) -> None:
        entry = Ledger(bench.folder).get("t0")
        assert entry is not None
        assert entry.end is None
        (lifted,) = [item for item in bench.exchange._news if item["kind"] == "hours_raised"]
        assert lifted["trial_ids"] == ["t0", "t3", "t4"]
        assert (await bench.advance(bench.trial(0), 1)).state == "done"
        assert (await bench.advance(bench.trial(3))).state == "done"
        assert (await bench.exchange.hours()).used == pytest.approx(12)

    ran = on_bench(first, max_gpu_hours=5)
    assert [assignment.work_id for assignment in ran] == ["t0", "t1", "t2", "none"]
    entries = {entry.trial.trial_id: entry for entry in Ledger(Path(ran[0].folder).parent).entries()}
    assert "t9" not in entries, "what was not begun leaves nothing"
    assert {name for name, entry in entries.items() if entry.end is not None} == {"t0", "t3", "t4"}
    assert not any(entry.ended_for_good for entry in entries.values())
    assert on_bench(as_before, max_gpu_hours=5) == []
    went_on = on_bench(raised, max_gpu_hours=50)
    assert [assignment.start for assignment in went_on] == [f"{ran[0].folder}/rung-0", None]


def test_a_group_that_comes_when_the_hours_are_used_up_is_held_back(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        answers = await asyncio.gather(*await at_once(bench, first_rungs(bench, 4)))
        assert [answer.state for answer in answers] == ["done", "done", "stopped", "stopped"]

    on_bench(scene, max_fused=2, max_gpu_hours=2)
    assert ScriptedGang.groups == [["t0", "t1"]]
