"""Results count once they are on disk; the next group runs while the last is written, and what is outdated is cleaned."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.ledger import Ledger
from orchestrator.runtime import exchange as cleaning
from orchestrator.runtime.assignments import MAX_ATTEMPTS
from orchestrator.runtime.gang import GangDiedError
from orchestrator.store import check_folder, commit_folder, read_json, write_json
from tests.unit.runtime.exchange_bench import Bench, ScriptedGang, at_once, first_rungs, gang_of, ids_of, until


def test_what_a_killed_driver_left_is_cleaned_by_the_next(on_bench: Callable[..., list[Any]]) -> None:
    """Of a trial that ended, every rung; of one that goes on, all but the last."""

    def rung(bench: Bench, trial_id: str, number: int) -> Path:
        return bench.folder / trial_id / f"rung-{number}"

    async def killed(bench: Bench) -> None:
        for number in (0, 1):
            for trial in (bench.trial(0), bench.trial(1)):
                await bench.advance(trial, number)
                with commit_folder(rung(bench, trial.trial_id, number)) as folder:
                    write_json(folder / "state.json", {"has_optimizer": True})
                    (folder / "state-rank0.safetensors").write_bytes(b"moments")
        Ledger(bench.folder).end("t0", "stopped")

    async def again(bench: Bench) -> None:
        await bench.exchange._cleaner.join()
        for trial_id, number, kept in (("t0", 0, False), ("t0", 1, False), ("t1", 0, False), ("t1", 1, True)):
            folder = rung(bench, trial_id, number)
            check_folder(folder)
            assert read_json(folder / "state.json")["has_optimizer"] is kept
            assert (folder / "state-rank0.safetensors").exists() is kept

    on_bench(killed)
    assert on_bench(again) == []


def test_what_cannot_be_cleaned_is_told_and_holds_nobody_up(
    on_bench: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(_: Path) -> None:
        raise KeyError("has_optimizer")

    monkeypatch.setattr(cleaning, "drop_optimizer_state", damaged)

    async def scene(bench: Bench) -> None:
        for rung in (0, 1, 2):
            assert (await bench.advance(bench.trial(0), rung)).state == "done"
        await bench.exchange._cleaner.join()
        assert bench.told().count("not_cleaned") == 3, "rung 0 twice"

    on_bench(scene)


def test_the_next_trial_runs_while_the_last_is_written_and_is_told_of_when_it_stands(
    on_bench: Callable[..., list[Any]],
) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.disk.clear()
        first, second = await at_once(bench, first_rungs(bench, 2))
        await until(lambda: len(ScriptedGang.ran) == 2)
        await asyncio.sleep(0.01)
        assert not first.done()
        assert not second.done()
        assert not any(entry.results for entry in Ledger(bench.folder).entries()), "nothing is known of it"
        ScriptedGang.disk.set()
        assert [(await call).state for call in (first, second)] == ["done", "done"]
        assert all(entry.results for entry in Ledger(bench.folder).entries())

    assert ids_of(on_bench(scene)) == ["t0", "t1"]


def test_no_more_than_one_group_waits_to_be_written(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.disk.clear()
        calls = await at_once(bench, first_rungs(bench, 3))
        await until(lambda: len(ScriptedGang.ran) == 2)
        await asyncio.sleep(0.01)
        assert len(ScriptedGang.ran) == 2
        ScriptedGang.disk.set()
        await asyncio.gather(*calls)

    assert ids_of(on_bench(scene)) == ["t0", "t1", "t2"]


def test_a_gang_killed_between_result_and_commit_loses_both_of_its_groups_once(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.disk.clear()
        first, second = await at_once(bench, first_rungs(bench, 2))
        await until(lambda: len(ScriptedGang.ran) == 1)
        ScriptedGang.go.clear()
        await asyncio.sleep(0.01)
        gang_of(bench).killed.set()
        ScriptedGang.disk.set()
        ScriptedGang.go.set()
        assert [(await call).state for call in (first, second)] == ["done", "done"]
        (figures,) = await bench.exchange.figures()
        assert (figures.replaced, figures.base_loads) == (1, 2)
        died = [item["trial_id"] for item in bench.exchange._news if item["kind"] == "gang_died"]
        assert sorted(died) == ["t0", "t1"]
        assert [len(entry.results) for entry in Ledger(bench.folder).entries()] == [1, 1]

    ran = on_bench(scene)
    assert ids_of(ran) == ["t0", "t0", "t1"]


@pytest.mark.parametrize("others", [0, 1])
def test_what_cannot_be_written_is_done_again_and_then_fails_and_the_others_go_on(
    on_bench: Callable[..., list[Any]], others: int
) -> None:
    """Whoever runs meanwhile loses one attempt by it: from then on the culprit is alone."""

    async def scene(bench: Bench) -> None:
        ScriptedGang.unwritten = {"t0": 99}
        calls = await at_once(bench, first_rungs(bench, 1 + others))
        answers = await asyncio.gather(*calls)
        assert [answer.state for answer in answers] == ["failed", *["done"] * others]
        assert "no space left on device" in answers[0].reason
        (figures,) = await bench.exchange.figures()
        assert figures.replaced == MAX_ATTEMPTS
        assert (await bench.advance(bench.trial(9))).state == "done"

    ran = ids_of(on_bench(scene))
    assert ran.count("t0") == MAX_ATTEMPTS
    assert ran.count("t1") in ((1, 2) if others else (0,))


def test_what_a_gang_has_died_of_is_run_and_written_alone(on_bench: Callable[..., list[Any]]) -> None:
    """Before it begins, what came before it stands; and nothing begins before it stands itself."""

    async def scene(bench: Bench) -> None:
        await bench.advance(bench.trial(0))
        ScriptedGang.deaths, ScriptedGang.unwritten = {"t1": 1}, {"t1": 1}
        ScriptedGang.gate.clear()
        culprit = asyncio.create_task(bench.advance(bench.trial(1)))
        await until(lambda: "gang_died" in bench.told())
        ScriptedGang.disk.clear()
        calls = [asyncio.create_task(call) for call in (bench.advance(bench.trial(0), 1), bench.advance(bench.trial(2)))]
        await asyncio.sleep(0.01)
        ScriptedGang.gate.set()
        await until(lambda: ScriptedGang.groups[-1] == ["t0"])
        await asyncio.sleep(0.01)
        assert ScriptedGang.groups == [["t0"], ["t1"], ["t0"]], "what came before it is being written"
        ScriptedGang.disk.set()
        assert [(await call).state for call in (culprit, *calls)] == ["done"] * 3
        died = [item["trial_id"] for item in bench.exchange._news if item["kind"] == "gang_died"]
        assert died == ["t1", "t1"], "nobody was beside it"

    assert ids_of(on_bench(scene)) == ["t0", "t1", "t0", "t1", "t1", "t2"]


def test_a_group_that_is_written_is_not_made_smaller_by_a_want_of_memory(on_bench: Callable[..., list[Any]]) -> None:
    """It had enough: the group that ran beside it had not."""

    async def scene(bench: Bench) -> None:
        ScriptedGang.disk.clear()
        ScriptedGang.fitting = {"t1": 4}
        calls = await at_once(bench, first_rungs(bench, 2))
        await until(lambda: len(ScriptedGang.ran) == 2)
        gang_of(bench).death = GangDiedError("out of memory on the node", out_of_memory=True)
        gang_of(bench).killed.set()
        ScriptedGang.disk.set()
        assert [(await call).state for call in calls] == ["done", "done"]

    rows = {(a.trial.trial_id, a.execution.micro_batch_rows) for a in on_bench(scene)}
    assert rows == {("t0", 8), ("t1", 8), ("t1", 4)}


def test_what_is_being_written_when_the_exchange_closes_is_written_down(on_bench: Callable[..., list[Any]]) -> None:
    folders: list[Path] = []

    async def scene(bench: Bench) -> None:
        ScriptedGang.disk.clear()
        folders.append(bench.folder)
        asyncio.create_task(bench.advance(bench.trial(0)))  # noqa: RUF006 - it ends with the exchange
        await until(lambda: len(ScriptedGang.ran) == 1)
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.05, ScriptedGang.disk.set)

    on_bench(scene)
    (entry,) = Ledger(folders[0]).entries()
    assert [result.state for result in entry.results] == ["done"]
