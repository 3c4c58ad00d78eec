"""The exchange: Tune's trials submit training work here, and gangs do it.

It is one actor, which owns the gangs, the queue between trials and gangs, and the ledger. An assignment is in exactly one
place: in the queue, or with one gang (`supervisor.py`), which runs it or writes its result. A result is recorded
and answered once its rung is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.anatomy import LayerSelection
from orchestrator.errors import BaseError, OrchestratorError, TrainingError
from orchestrator.plan import evaluate_base
from orchestrator.plan.values import SweepPlan
from orchestrator.run.hours import Allowance, HoursState, Meter, is_spent
from orchestrator.run.ledger import Ledger, TrialEntry, TrialState, base_result, drop_optimizer_state, is_tried_again
from orchestrator.run.records import trial_record
from orchestrator.runtime.assignments import (
    Answer,
    GangFigures,
    Orders,
    QueuedWork,
    answer_of,
    failed_answer,
    held_back_answer,
    rung_assignment,
)
from orchestrator.runtime.failures import cause_of
from orchestrator.runtime.first_steps import FirstSteps
from orchestrator.runtime.gang import Gang, why_no_start
from orchestrator.runtime.supervisor import Supervisor
from orchestrator.runtime.work_queue import WorkQueue
from orchestrator.transfer.run_view import Activity
from orchestrator.work.assignment import Measurement, TrainRung, TrialWork, Work
from orchestrator.work.failure import Failure
from orchestrator.work.results import MeasurementResult, RungResult, WorkResult
from orchestrator.work.trial import TrialSpec


class Exchange:
    """The actor's class (`ray.remote(Exchange)`), which runs on the actor's asyncio loop."""

    def __init__(self, orders: Orders, clock: Callable[[], float] = time.monotonic) -> None:
        self._orders = orders
        self._context = orders.context()
        self._ledger = Ledger(Path(orders.trials_folder))
        self._queue = WorkQueue(orders.plan, orders.anatomy, orders.num_gangs)
        self._sequence = itertools.count()
        self._needed = asyncio.Event()
        self._inflight: dict[str, QueuedWork] = {}
        self._news: list[dict] = []
        self._figures = [GangFigures() for _ in range(orders.num_gangs)]
        self._serving: list[asyncio.Task] = []
        self._supervisors: list[Supervisor] = []
        self._broken: OrchestratorError | None = None
        self._cleaner = Cleaner(lambda message: self._emit("not_cleaned", message))
        self._first_steps = FirstSteps(orders.plan, orders.anatomy, orders.num_gangs)
        self._meter = Meter(Path(orders.hours_file), clock)
        self._allowance = Allowance(
            self._meter,
            orders.max_gpu_hours,
            self._ledger,
            orders.scoring,
            lambda message: self._emit("hours_spent", message),
        )

    async def open(self) -> None:
        """Prepare the gangs. They start with the first work, since a finished search needs none."""
        if not is_spent(self._meter.used_hours, self._orders.max_gpu_hours):
            lifted = self._ledger.lift_bounds()
            if lifted:
                self._emit("hours_raised", f"more GPU-hours are available: {', '.join(lifted)} continue", trial_ids=lifted)
        for entry in self._ledger.entries():
            self._emit_trial(entry.trial.trial_id)
            # A killed driver may have left optimizer states behind; checking a clean checkpoint again is cheap.
            self._cleaner.drop_optimizer_states(entry.results if entry.ended_for_good else entry.results[:-1])
        self._cleaner.start()
        self._meter.open()
        plan = self._orders.plan
        for index in range(self._orders.num_gangs):
            gang = Gang(index, plan.base, self._orders.anatomy, plan.execution, self._meter, self._orders.timeouts)
            supervisor = Supervisor(
                gang, plan.execution, self._queue, self._figures[index], self._refuses, self._settle, self._emit
            )
            self._supervisors.append(supervisor)
            self._serving.append(asyncio.create_task(self._serve(supervisor)))

    async def train_to_rung(
        self, trial: TrialSpec, selection: LayerSelection, option: int | None, rung: int, stop_step: int
    ) -> Answer:
        """Train a trial to a rung, or answer from the ledger if that has been done.

        Args:
            selection: The trainable weights.
            option: Index in the plan's options; None for a control.
            rung: 0, 1, ...; the rung before must have been reached.
            stop_step: The rung's step.
        """
        self._queue.heard_from(trial.trial_id)
        if self._ledger.get(trial.trial_id) is None and self._allowance.refuses(trial):
            return held_back_answer(self._allowance.reason)
        is_new = self._ledger.get(trial.trial_id) is None
        entry = self._ledger.register(trial, option)
        if is_new:
            self._emit_trial(trial.trial_id)
        known = next((result for result in entry.results if result.rung == rung), None)
        if known is None and entry.end is not None:
            return self._answer(entry.results[-1], ended=True) if entry.results else failed_answer()
        if known is None and not self._allowance.refuses(trial):
            known = await self._train(trial, selection, rung, stop_step)
        if known is None:
            return self._hold_back(trial)
        entry = self._ledger.register(trial, option)
        if entry.end is None and stop_step < trial.total_steps:
            await self._end_if_stalled(entry)
            entry = self._ledger.register(trial, option)
        over = entry.end is not None and all(known.rung >= other.rung for other in entry.results)
        return self._answer(known, ended=over or known.state == "failed")

    async def train_to_end(self, trial: TrialSpec, selection: LayerSelection, stops: tuple[int, ...]) -> Answer:
        """Train a control from rung to rung to its end, and return the last answer.

        Args:
            stops: The step at which each rung ends.
        """
        for rung, stop_step in enumerate(stops[:-1]):
            answer = await self.train_to_rung(trial, selection, None, rung, stop_step)
            if answer.ended:
                return answer
        return await self.train_to_rung(trial, selection, None, len(stops) - 1, stops[-1])

    async def measure(self, work: Measurement) -> MeasurementResult:
        """Have a gang make a measurement, which is not recorded in the ledger."""
        result = await self._hand_out(work)
        assert isinstance(result, MeasurementResult), "a measurement is never held back"
        return result

    async def replan(self, plan: SweepPlan) -> None:
        """Replace the plan by the one made after a measurement; its gangs and options are the same."""
        self._orders = self._orders.model_copy(update={"plan": plan})
        self._context = self._orders.context()
        begun = self._first_steps.begun
        self._first_steps = FirstSteps(plan, self._orders.anatomy, self._orders.num_gangs, begun=begun)

    async def finish(self, trial_id: str, state: TrialState, reason: str = "") -> None:
        """End a trial: free its place at once, record its end, and delete the files that only a continuation needs."""
        self._queue.heard_from(trial_id)
        work = self._inflight.pop(trial_id, None)
        if work is not None:
            work.answer(work.assignment.failed(Failure(kind="withdrawn", message=f"{state} before it ran")))
        entry = self._ledger.get(trial_id)
        if entry is not None and entry.end is None and not is_tried_again(entry.trial, state):
            self._ledger.end(trial_id, state, reason)
            self._emit_trial(trial_id)
            self._cleaner.drop_optimizer_states(entry.results)

    async def news(self, since: int) -> list[dict]:
        """Events from number `since` on, in order."""
        return self._news[since:]

    async def is_spent(self) -> bool:
        """Return whether no new trial may start because the GPU-hours are spent."""
        return self._allowance.refuses()

    async def hours(self) -> HoursState:
        return self._allowance.state()

    async def figures(self) -> list[GangFigures]:
        return self._figures

    async def activities(self) -> tuple[Activity, ...]:
        """Return what each gang is doing, without idle gangs."""
        return tuple(activity for supervisor in self._supervisors for activity in supervisor.activities())

    async def gang_pids(self) -> list[tuple[int, ...]]:
        return [supervisor.gang.pids for supervisor in self._supervisors]

    async def close(self) -> None:
        """Shut down the gangs and release their placement groups, after waiting for results that are still being written."""
        for serving in self._serving:
            serving.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await asyncio.gather(*(supervisor.written() for supervisor in self._supervisors), return_exceptions=True)
        # All at once: each gang waits for its own processes.
        await asyncio.gather(*(supervisor.gang.close() for supervisor in self._supervisors))
        self._meter.close()
        await self._cleaner.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _train(self, trial: TrialSpec, selection: LayerSelection, rung: int, stop_step: int) -> RungResult | None:
        """Return the rung's result; None if the GPU-hours were spent before a gang was free."""
        entry = self._ledger.get(trial.trial_id)
        assert entry is not None
        known = self._inflight.get(trial.trial_id)
        if known is not None and isinstance(known.assignment, TrialWork) and known.assignment.rung == rung:
            # The earlier caller is gone: Tune restarted its trial while the rung was still being trained.
            return _rung_of(await asyncio.shield(known.future))
        folder = str(self._ledger.folder(trial.trial_id))
        plan, context, results = self._orders.plan, self._context, entry.results
        if trial.control == "none":
            return _rung_of(await self._hand_out(evaluate_base(plan, context, trial, selection, folder)))
        work = rung_assignment(plan, context, trial, selection, folder, results, rung, stop_step)
        return _rung_of(await self._hand_out(work, home=results[-1].gang if results else None))

    async def _hand_out(self, assignment: Work, home: int | None = None) -> WorkResult | None:
        """Queue work and await its result; None if the GPU-hours were spent before a gang was free."""
        if self._broken is not None:
            raise self._broken
        work = QueuedWork(self._priority(assignment), assignment, asyncio.get_running_loop().create_future(), home=home)
        self._inflight[assignment.work_id] = work
        self._queue.put(work)
        self._needed.set()
        try:
            return await work.future
        finally:
            self._inflight.pop(assignment.work_id, None)

    def _priority(self, assignment: Work) -> tuple[int, int, int]:
        """Return the priority of work: measurements and the base model first, since the search waits for them."""
        if isinstance(assignment, TrainRung):
            return (1, -assignment.rung, next(self._sequence))
        return (0, 0, next(self._sequence))

    def _refuses(self, assignment: Work) -> bool:
        return isinstance(assignment, TrainRung) and self._allowance.refuses(assignment.trial)

    async def _end_if_stalled(self, entry: TrialEntry) -> None:
        reason = self._orders.scoring.stalled(entry.results, base_result(self._ledger))
        if reason:
            await self.finish(entry.trial.trial_id, "stopped", reason)

    def _hold_back(self, trial: TrialSpec) -> Answer:
        """Stop a trial because the GPU-hours are spent, so that a submission with more hours can continue it."""
        reason = self._allowance.reason
        self._ledger.end(trial.trial_id, "stopped", reason, for_want_of_hours=True)
        self._emit_trial(trial.trial_id)
        entry = self._ledger.get(trial.trial_id)
        if entry is None or not entry.results:
            return held_back_answer(reason)
        return self._answer(entry.results[-1], ended=True).model_copy(update={"state": "stopped", "reason": reason})

    async def _serve(self, supervisor: Supervisor) -> None:
        """Serve one gang until the end. If it cannot be replaced, report that it is lost."""
        gang = supervisor.gang
        try:
            await self._needed.wait()
            await supervisor.serve()
        except Exception as error:
            self._emit("gang_lost", f"gang {gang.index} stopped serving: {error!r}", gang=gang.index)
            gang.pids = ()
            try:
                gang.kill()
            finally:  # unwritten work returns to the queue before the queue is cleared
                with contextlib.suppress(Exception):
                    await supervisor.written()
                self._queue.lose_gang()
                self._give_up(error)

    def _settle(self, work: QueuedWork, result: WorkResult) -> None:
        """Record a result, then answer the call that waits for it."""
        if not isinstance(result, RungResult):
            work.answer(result)
            return
        try:
            self._record(result)
        except Exception as error:  # a full disk, say: the waiting call must fail, or it would wait forever
            work.fail(error)
            return
        work.answer(result)
        entry = self._ledger.get(result.trial_id)
        assert entry is not None
        self._cleaner.drop_optimizer_states(other for other in entry.results if other.rung < result.rung)

    def _record(self, result: RungResult) -> None:
        entry = self._ledger.get(result.trial_id)
        assert entry is not None
        if not is_tried_again(entry.trial, result.state):
            self._ledger.add(result)
            if result.state == "failed":
                self._ledger.end(result.trial_id, "failed", result.reason)
        for note in result.notes:
            self._emit("trial_note", f"{result.trial_id}: {note}", trial_id=result.trial_id, rung=result.rung)
        self._emit_trial(result.trial_id)
        event = self._first_steps.add(entry.option, result)
        if event:
            self._emit(**event)

    def _answer(self, result: RungResult, *, ended: bool) -> Answer:
        entry = self._ledger.get(result.trial_id)
        before = [other for other in entry.results if other.rung < result.rung] if entry is not None else []
        return answer_of([*before, result], base_result(self._ledger), self._orders.scoring, ended=ended)

    def _give_up(self, error: BaseException) -> None:
        """Fail all waiting calls if no gang is left that could serve them."""
        if any(not task.done() for task in self._serving if task is not asyncio.current_task()):
            return
        own = cause_of(error)
        # A base that cannot be loaded, or fails its self-test, is the user's to replace: no other gang would do better.
        self._broken = (
            own
            if isinstance(own, BaseError)
            else TrainingError(
                f"no gang could be started: {why_no_start(error)}", remedy="see the gang_failed_to_start lines in events.jsonl"
            )
        )
        for work in self._queue.clear():
            work.fail(self._broken)

    def _emit(self, kind: str, message: str, **fields: object) -> None:
        # Kept for the whole run: a watcher that lost an answer asks again from the number that it has.
        self._news.append({"kind": kind, "message": message, **fields})

    def _emit_trial(self, trial_id: str) -> None:
        entry = self._ledger.get(trial_id)
        assert entry is not None
        record = trial_record(entry, self._orders.scoring, base_result(self._ledger))
        self._news.append({"kind": "trial", "record": record})


def _rung_of(result: WorkResult | None) -> RungResult | None:
    assert not isinstance(result, MeasurementResult)
    return result


class Cleaner:
    """Deletes outdated optimizer state in the background, one folder after another: a folder has one writer at a time.

    Args:
        emit: Called with a sentence for each checkpoint that could not be cleaned.
    """

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._outdated: asyncio.Queue[Path] = asyncio.Queue()
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._clean())

    def drop_optimizer_states(self, results: Iterable[RungResult]) -> None:
        """Schedule the deletion of these rungs' optimizer state; their adapter or delta stays."""
        for result in results:
            if result.checkpoint is not None:
                self._outdated.put_nowait(Path(result.checkpoint))

    async def join(self) -> None:
        """Wait until all submitted cleaning is done."""
        await self._outdated.join()

    async def close(self) -> None:
        if self._task is not None:
            await self.join()
            self._task.cancel()

    async def _clean(self) -> None:
        while True:
            checkpoint = await self._outdated.get()
            try:
                await asyncio.to_thread(drop_optimizer_state, checkpoint)
            except (
                Exception
            ) as error:  # any error: `close` waits for the queue, and a task that ended here would block it forever
                self._emit(f"{checkpoint} keeps its optimizer state: {error}")
            finally:
                self._outdated.task_done()
