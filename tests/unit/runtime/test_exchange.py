"""The exchange's promises: work is never lost, nobody waits for ever, nothing known is computed again.

The gangs are stand-ins without processes, whose deaths are written in a script; everything else is the real thing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import TrainingError
from orchestrator.plan import make_trial
from orchestrator.plan.values import RunPlan
from orchestrator.run.hours import Meter
from orchestrator.run.ledger import Ledger
from orchestrator.run.scoring import Scoring
from orchestrator.runtime import exchange as cleaning
from orchestrator.runtime import exchange as exchange_module
from orchestrator.runtime import work_queue as queue
from orchestrator.runtime.assignments import MAX_ATTEMPTS, Answer, Orders
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.gang import GangDiedError
from orchestrator.store import check_folder, commit_folder, read_json, write_json
from orchestrator.transfer.view import Activity
from orchestrator.work.assignment import EvaluateBase, ScoreBlocks, TrainRung, Work
from orchestrator.work.execution import DataPaths, TrainSettings
from orchestrator.work.measurements import LayerScores, ProbePlan
from orchestrator.work.results import MeasurementResult, RungResult, WorkResult
from orchestrator.work.trial import TrialSpec

DEADLINE_S = 20
RUNGS = (4, 12, 36)
HOUR_S = 3600


class Clock:
    """Every assignment takes an hour."""

    now_s = 0.0


class ScriptedGang:
    """A gang without processes.

    `gate` is closed while it may not start, `go` while its work may not end, `disk` while nothing is written. `deaths` says
    how often it dies on each trial, `unwritten` how often it cannot write one, `fitting` with how many rows in a micro-batch
    it does not run out of memory on one, `dead_starts` how often it cannot start and `refusal` why, `broken` which trials
    fail for a reason of their own, `losses` what a trial scores at its rungs (2 where nothing is said).
    """

    deaths: dict[str, int]
    unwritten: dict[str, int]
    fitting: dict[str, int]
    dead_starts: int
    refusal: Exception
    broken: set[str]
    losses: dict[str, list[float]]
    ran: list[Any]
    groups: list[list[str]]
    gate: asyncio.Event
    go: asyncio.Event
    disk: asyncio.Event

    def __init__(self, index: int, *given: object) -> None:
        self.index = index
        self.meter = next(value for value in given if isinstance(value, Meter))
        self.pids: tuple[int, ...] = ()
        self.base_loads = 0
        self.start_seconds = 0.0
        self.starting = ""
        self.last: list[str] = []
        self.killed = asyncio.Event()
        self.death = GangDiedError(f"gang {index} was killed")

    async def start(self) -> None:
        self.starting = "waiting for 1 free core"
        await self.gate.wait()
        self.starting = ""
        if ScriptedGang.dead_starts:
            ScriptedGang.dead_starts -= 1
            raise ScriptedGang.refusal
        self.meter.hold(self.index, 2)
        self.base_loads += 1
        self.killed = asyncio.Event()
        self.pids = (self.base_loads,)

    async def run(self, group: Sequence[Work]) -> list[WorkResult]:
        await asyncio.sleep(0)
        await self.unless_killed(self.go)
        Clock.now_s += HOUR_S
        self.groups.append([assignment.work_id for assignment in group])
        self.ran.extend(group)
        self.last = self.groups[-1]
        return [self.run_one(assignment) for assignment in group]

    def run_one(self, assignment: Work) -> WorkResult:
        trial_id = assignment.work_id
        if self.deaths.get(trial_id, 0):
            self.deaths[trial_id] -= 1
            raise GangDiedError(f"gang {self.index} broke")
        if assignment.execution.micro_batch_rows > self.fitting.get(trial_id, 99):
            raise GangDiedError("out of memory on rank 1", out_of_memory=True)
        if trial_id in self.broken:
            return assignment.failed("it broke")
        if not isinstance(assignment, TrainRung | EvaluateBase):
            return MeasurementResult(work_id=assignment.work_id, found=LayerScores())
        checkpoint = f"{assignment.folder}/rung-{assignment.rung}"
        return RungResult(
            trial_id=trial_id,
            rung=assignment.rung,
            step=assignment.stop_step if isinstance(assignment, TrainRung) else 0,
            tokens=1,
            state="done",
            eval_loss=self.losses[trial_id][assignment.rung] if trial_id in self.losses else 2.0,
            checkpoint=checkpoint,
            gang=self.index,
        )

    async def settle(self) -> None:
        group = self.last
        await asyncio.sleep(0)
        await self.unless_killed(self.disk)
        for trial_id in group:
            if self.unwritten.get(trial_id, 0):
                self.unwritten[trial_id] -= 1
                raise GangDiedError(f"gang {self.index} failed: no space left on device")

    async def unless_killed(self, event: asyncio.Event) -> None:
        """Until something happens, or, as with real processes, until the gang is killed."""
        waits = [asyncio.ensure_future(each.wait()) for each in (event, self.killed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.killed.is_set():
            raise self.death

    def kill(self) -> None:
        self.meter.release(self.index)
        self.pids = ()
        self.killed.set()

    async def close(self) -> None:
        self.kill()


class Bench:
    """An exchange over scripted gangs."""

    def __init__(self, plan: RunPlan, anatomy: ModelAnatomy, folder: Path, num_gangs: int, max_gpu_hours: float | None) -> None:
        assert plan.search is not None
        self.plan = plan
        self.option = plan.search.options[0]
        self.folder = folder
        self.exchange = Exchange(
            Orders(
                plan=plan,
                anatomy=anatomy,
                settings=TrainSettings(warmup=0, schedule="constant", weight_decay=0, grad_clip=0, tokens_per_step=512),
                data=DataPaths(train="train.npz", eval="eval.npz"),
                scoring=Scoring(metric="loss", max_forgetting=1, patience=plan.search.patience),
                trials_folder=str(folder),
                num_gangs=num_gangs,
                hours_file=str(folder / "hours.json"),
                max_gpu_hours=max_gpu_hours,
            ),
            clock=lambda: Clock.now_s,
        )

    def trial(self, number: int) -> TrialSpec:
        return make_trial(self.plan, self.option, 1e-3, number, seed=0).model_copy(update={"trial_id": f"t{number}"})

    def none(self) -> TrialSpec:
        return self.trial(-3).model_copy(update={"trial_id": "none", "control": "none"})

    def advance(self, trial: TrialSpec, rung: int = 0) -> Coroutine[Any, Any, Answer]:
        return self.exchange.advance(trial, self.option.selection, 0, rung, RUNGS[rung])

    def told(self) -> list[str]:
        return [item["kind"] for item in self.exchange._news if item["kind"] != "trial"]


Play = Callable[[Bench], Coroutine[Any, Any, None]]


@pytest.fixture
def on_bench(plan: RunPlan, anatomy: ModelAnatomy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Play a scene with an open exchange; what the gangs were given to run."""
    monkeypatch.setattr(exchange_module, "Gang", ScriptedGang)

    def play(
        scene: Play,
        *,
        deaths: dict[str, int] | None = None,
        dead_starts: int = 0,
        gangs: int = 1,
        max_gpu_hours: float | None = None,
        max_fused: int = 1,
        patience: int | None = None,
    ) -> list[Any]:
        assert plan.search is not None
        changed = {"max_fused": max_fused, "patience": patience}
        fusing = plan.model_copy(update={"search": plan.search.model_copy(update=changed)})
        ScriptedGang.deaths, ScriptedGang.dead_starts, ScriptedGang.ran = deaths or {}, dead_starts, []
        ScriptedGang.groups, ScriptedGang.unwritten = [], {}
        ScriptedGang.refusal, ScriptedGang.broken, ScriptedGang.fitting = GangDiedError("no room"), set(), {}
        ScriptedGang.losses = {}

        async def run() -> None:
            ScriptedGang.gate = asyncio.Event()
            ScriptedGang.gate.set()
            ScriptedGang.go = asyncio.Event()
            ScriptedGang.go.set()
            ScriptedGang.disk = asyncio.Event()
            ScriptedGang.disk.set()
            bench = Bench(fusing, anatomy, tmp_path, gangs, max_gpu_hours)
            await bench.exchange.open()
            try:
                await asyncio.wait_for(scene(bench), DEADLINE_S)
            except BaseException:
                ScriptedGang.disk.set()  # else the exchange would wait for it
                raise
            finally:
                await bench.exchange.close()

        asyncio.run(run())
        return ScriptedGang.ran

    return play


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

    ran = on_bench(scene, deaths={"t0": 99})
    assert [assignment.work_id for assignment in ran].count("t0") == MAX_ATTEMPTS


def rows_of(assignments: list[Any]) -> list[int]:
    return [assignment.execution.micro_batch_rows for assignment in assignments]


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


# -- groups that may share a batch -------------------------------------------------------------------------------------


async def at_once(bench: Bench, calls: Sequence[Coroutine[Any, Any, Answer]]) -> list[asyncio.Task[Answer]]:
    """All of them in the queue before a gang is ready."""
    ScriptedGang.gate.clear()
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0.01)
    ScriptedGang.gate.set()
    return tasks


def first_rungs(bench: Bench, count: int) -> list[Coroutine[Any, Any, Answer]]:
    return [bench.advance(bench.trial(number)) for number in range(count)]


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


def test_a_group_that_comes_when_the_hours_are_used_up_is_held_back(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        answers = await asyncio.gather(*await at_once(bench, first_rungs(bench, 4)))
        assert [answer.state for answer in answers] == ["done", "done", "stopped", "stopped"]

    on_bench(scene, max_fused=2, max_gpu_hours=2)
    assert ScriptedGang.groups == [["t0", "t1"]]


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


# -- what was learned is written while the gang goes on ----------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def gang_of(bench: Bench) -> ScriptedGang:
    gang = bench.exchange._supervisors[0].gang
    assert isinstance(gang, ScriptedGang)
    return gang


def ids_of(assignments: Sequence[Any]) -> list[str]:
    return [assignment.trial.trial_id for assignment in assignments]


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


EVEN = (5, 10, 15, 20, 25, 30, 36)


def test_a_trial_that_gets_worse_ends_and_is_worth_its_best_rung(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [3.0, 2.5, 2.6, 2.7], "t1": [3.0, 2.5, 2.6, 2.4, 2.5, 2.45, 2.6], "t2": [9.0]}
        for number, reached in ((0, 4), (1, 6)):
            trial = bench.trial(number)
            answers = [
                await bench.exchange.advance(trial, bench.option.selection, 0, rung, EVEN[rung]) for rung in range(reached)
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
        answers = [await bench.exchange.advance(bench.trial(0), bench.option.selection, 0, rung, EVEN[rung]) for rung in range(4)]
        assert [(answer.score, answer.ended) for answer in answers] == [(3.0, False), (2.5, False), (2.5, False), (2.5, True)]

    assert len(on_bench(scene, patience=2)) == 10
    assert on_bench(again, patience=2) == [], "what is known is not trained again"


def test_a_driver_that_died_before_the_end_was_written_changes_nothing(on_bench: Callable[..., list[Any]]) -> None:
    async def first(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [2.5, 2.6, 2.7]}
        for rung in range(3):
            await bench.exchange.advance(bench.trial(0), bench.option.selection, 0, rung, EVEN[rung])
        (bench.folder / "t0" / "end.json").unlink()

    async def again(bench: Bench) -> None:
        assert (await bench.exchange.advance(bench.trial(0), bench.option.selection, 0, 2, EVEN[2])).ended
        assert (bench.folder / "t0" / "end.json").exists()

    on_bench(first, patience=2)
    assert on_bench(again, patience=2) == []


def test_a_trial_at_its_last_step_does_not_stall(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [2.0, 3.0, 4.0]}
        for rung, step in enumerate((5, 10, bench.trial(0).total_steps)):
            answer = await bench.exchange.advance(bench.trial(0), bench.option.selection, 0, rung, step)
            assert not answer.ended
        assert answer.score == 2.0

    assert len(on_bench(scene, patience=2)) == 3


def test_without_patience_a_trial_is_worth_its_last_rung(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [2.0, 3.0, 4.0, 5.0]}
        for rung in range(4):
            answer = await bench.exchange.advance(bench.trial(0), bench.option.selection, 0, rung, EVEN[rung])
            assert (answer.score, answer.ended) == (ScriptedGang.losses["t0"][rung], False)

    on_bench(scene)


def test_a_control_is_carried_from_rung_to_rung_until_it_gets_worse(on_bench: Callable[..., list[Any]]) -> None:
    async def scene(bench: Bench) -> None:
        ScriptedGang.losses = {"t0": [3.0, 2.0, 2.1, 2.2, 1.0], "t1": [3.0]}
        assert (await bench.exchange.carry(bench.trial(0), bench.option.selection, EVEN)).score == 2.0
        assert (await bench.exchange.carry(bench.trial(1), bench.option.selection, (36,))).score == 3.0

    ran = on_bench(scene, patience=2)
    assert [assignment.stop_step for assignment in ran] == [5, 10, 15, 20, 36]
