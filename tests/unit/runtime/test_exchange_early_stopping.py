"""With early stopping a trial that gets worse ends, and is judged by its best rung."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.unit.runtime.exchange_bench import Bench, ScriptedGang

EVEN = (5, 10, 15, 20, 25, 30, 36)


def test_a_trial_that_gets_worse_ends_and_is_worth_its_best_rung(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [3.0, 2.5, 2.6, 2.7], "t1": [3.0, 2.5, 2.6, 2.4, 2.5, 2.45, 2.6], "t2": [9.0]}
        for number, reached in ((0, 4), (1, 6)):
            trial = bench.trial(number)
            answers = [
                await bench.exchange.train_to_rung(trial, bench.option.selection, 0, rung, EVEN[rung]) for rung in range(reached)
            ]
            assert [answer.ended for answer in answers] == [False] * (reached - 1) + [True]
            assert answers[-1].score == answers[-1].metric == min(ScriptedGang.losses[trial.trial_id][:reached])
            assert answers[-1].step == EVEN[reached - 1], "how far it came, not where it was best"
            await bench.exchange.finish(trial.trial_id, "stopped")
        ends = [bench.exchange._ledger.get(f"t{number}").end for number in (0, 1)]  # type: ignore[union-attr]
        assert [(end.state, end.reason) for end in ends if end is not None] == [
            ("stopped", "its held-out loss has not improved since step 10"),
            ("stopped", "its held-out loss has not improved since step 20"),
        ]

    async def again(bench: Bench) -> None:
        answers = [
            await bench.exchange.train_to_rung(bench.trial(0), bench.option.selection, 0, rung, EVEN[rung]) for rung in range(4)
        ]
        assert [(answer.score, answer.ended) for answer in answers] == [(3.0, False), (2.5, False), (2.5, False), (2.5, True)]

    assert len(on_bench(scene, patience=2)) == 10
    assert on_bench(again, patience=2) == [], "what is known is not trained again"


def test_a_driver_that_died_before_the_end_was_written_changes_nothing(on_bench: Callable[..., list[Any]]) -> None:
    async def first(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [2.5, 2.6, 2.7]}
        for rung in range(3):
            await bench.exchange.train_to_rung(bench.trial(0), bench.option.selection, 0, rung, EVEN[rung])
        (bench.folder / "t0" / "end.json").unlink()

    async def again(bench: Bench) -> None:
        assert (await bench.exchange.train_to_rung(bench.trial(0), bench.option.selection, 0, 2, EVEN[2])).ended
        assert (bench.folder / "t0" / "end.json").exists()

    on_bench(first, patience=2)
    assert on_bench(again, patience=2) == []


def test_a_trial_at_its_last_step_does_not_stall(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [2.0, 3.0, 4.0]}
        for rung, step in enumerate((5, 10, bench.trial(0).total_steps)):
            answer = await bench.exchange.train_to_rung(bench.trial(0), bench.option.selection, 0, rung, step)
            assert not answer.ended
        assert answer.score == 2.0

    assert len(on_bench(scene, patience=2)) == 3


def test_without_patience_a_trial_is_worth_its_last_rung(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [2.0, 3.0, 4.0, 5.0]}
        for rung in range(4):
            answer = await bench.exchange.train_to_rung(bench.trial(0), bench.option.selection, 0, rung, EVEN[rung])
            assert (answer.score, answer.ended) == (ScriptedGang.losses["t0"][rung], False)

    on_bench(scene)


def test_a_control_is_carried_from_rung_to_rung_until_it_gets_worse(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [3.0, 2.0, 2.1, 2.2, 1.0], "t1": [3.0]}
        assert (await bench.exchange.train_to_end(bench.trial(0), bench.option.selection, EVEN)).score == 2.0
        assert (await bench.exchange.train_to_end(bench.trial(1), bench.option.selection, (36,))).score == 3.0

    ran = on_bench(scene, patience=2)
    assert [assignment.stop_step for assignment in ran] == [5, 10, 15, 20, 36]
