"""An exchange over scripted gangs: stand-ins without processes, whose failures are written in a script. The rest is real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan import make_trial
from orchestrator.plan.values import RunPlan
from orchestrator.run.hours import Meter
from orchestrator.run.scoring import Scoring
from orchestrator.runtime import exchange as exchange_module
from orchestrator.runtime.assignments import Answer, Orders
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.gang import GangDiedError
from orchestrator.work.assignment import EvaluateBase, TrainRung, Work
from orchestrator.work.execution import DataPaths, TrainSettings
from orchestrator.work.failure import Failure
from orchestrator.work.measurements import LayerScores
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
            return assignment.failed(Failure(kind="training", message="it broke"))
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
        return self.exchange.train_to_rung(trial, self.option.selection, 0, rung, RUNGS[rung])

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


def rows_of(assignments: list[Any]) -> list[int]:
    return [assignment.execution.micro_batch_rows for assignment in assignments]


async def at_once(bench: Bench, calls: Sequence[Coroutine[Any, Any, Answer]]) -> list[asyncio.Task[Answer]]:
    """All of them in the queue before a gang is ready."""
    ScriptedGang.gate.clear()
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0.01)
    ScriptedGang.gate.set()
    return tasks


def first_rungs(bench: Bench, count: int) -> list[Coroutine[Any, Any, Answer]]:
    return [bench.advance(bench.trial(number)) for number in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def gang_of(bench: Bench) -> ScriptedGang:
    gang = bench.exchange._supervisors[0].gang
    assert isinstance(gang, ScriptedGang)
    return gang


def ids_of(assignments: Sequence[Any]) -> list[str]:
    return [assignment.trial.trial_id for assignment in assignments]
