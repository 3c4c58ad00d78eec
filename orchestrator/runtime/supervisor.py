"""One gang at work: it takes what is next while what it has just learned is written, and is replaced when it dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from orchestrator.errors import TrainingError
from orchestrator.run.activities import activity_of
from orchestrator.runtime.assignments import MAX_ATTEMPTS, GangFigures, Work, next_attempt, with_history
from orchestrator.runtime.gang import Gang, GangDiedError, why_no_start
from orchestrator.runtime.work_queue import WorkQueue
from orchestrator.transfer.view import Activity
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec


class Shift:
    """What one gang does, from the first work to the end.

    It has at most two groups: one that runs, and the one before it, whose rungs are written beside that. When the gang
    dies, what it has goes back to the queue, to start again from each trial's last rung.

    Args:
        gang: Not started.
        planned: What the plan gives every trial.
        queue: Where work comes from.
        figures: How the gang spends its time goes here.
        refuses: Whether the bound on hours holds a trial back.
        settle: Writes a result down, whose rung stands, and answers whoever waits for it.
        tell: Writes an event down.
    """

    def __init__(
        self,
        gang: Gang,
        planned: ExecutionPlan,
        queue: WorkQueue,
        figures: GangFigures,
        refuses: Callable[[TrialSpec], bool],
        settle: Callable[[Work, RungResult], None],
        tell: Tell,
    ) -> None:
        self.gang = gang
        self._planned = planned
        self._queue = queue
        self._figures = figures
        self._refuses = refuses
        self._settle = settle
        self._tell = tell
        self._writing: asyncio.Task[None] | None = None
        self._running: Sequence[Work] = ()

    def activities(self) -> tuple[Activity, ...]:
        """What the gang is doing at this moment; nothing while it is idle."""
        if self.gang.starting:
            return (Activity(doing=self.gang.starting, gang=self.gang.index),)
        return tuple(activity_of(work.assignment, self.gang.index) for work in self._running)

    async def work_off(self) -> None:
        """Start, take work, answer; start again when the gang dies. Raises what the last failed start raised."""
        idle_since: float | None = None
        while True:
            if not self.gang.pids:
                await self.written()
                await start_gang(self.gang, self._figures, self._tell)
            async with self._queue.next_group(self.gang.index) as group:
                if group[0].attempts:  # a gang has died of it: what it does is done alone
                    await self.written()
                if not self.gang.pids:  # it died over what it was writing
                    idle_since = None
                    for work in group:
                        self._queue.put(work)
                    continue
                if self._refuses(group[0].assignment.trial):
                    for work in group:
                        work.answer(None)
                    continue
                if idle_since is not None:
                    self._figures.idle_s.append(time.monotonic() - idle_since)
                try:
                    answered_at = await self._run(group)
                except Exception as error:
                    for work in group:
                        work.fail(error)
                    raise
                idle_since = answered_at if self.gang.pids else None

    async def written(self) -> None:
        """Until the group before has been answered, or has gone back to the queue. Raises what ending the gang raised."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    async def _run(self, group: Sequence[Work]) -> float:
        """Run a group and leave it to be written; on a dead gang, put it back and leave the gang to be replaced.

        Returns:
            When the gang had nothing more to do, by the monotonic clock: it may have to wait for the group before to be written.
        """
        works = {work.assignment.trial.trial_id: work for work in group}
        started = time.monotonic()
        self._running = group
        try:
            answers, death = await self._answers(group)
        finally:
            self._running = ()
        answered_at = time.monotonic()
        self._figures.busy_s += answered_at - started
        if death is not None:
            await self.written()
            for result in self._bury(group, death):
                self._settle(works[result.trial_id], result)
            return answered_at
        results = [with_history(result, works[result.trial_id], self._planned) for result in answers]
        self._queue.note_width(group, results)
        self._queue.expect(_going_on(works, results))
        # Kept before anything is awaited: who is cancelled here has its results written down all the same.
        before, self._writing = self._writing, asyncio.create_task(self._write(self._writing, works, results))
        if before is not None:
            await asyncio.wait([before])
            before.result()
        if group[0].attempts:
            await self.written()
        return answered_at

    async def _answers(self, group: Sequence[Work]) -> tuple[list[RungResult], TrainingError | None]:
        """What the gang answers, or what it died of."""
        try:
            return await self.gang.run([work.assignment for work in group]), None
        except TrainingError as death:
            return [], death

    async def _write(self, before: asyncio.Task[None] | None, works: Mapping[str, Work], results: Sequence[RungResult]) -> None:
        """Answer each member of a group once its rung stands, after the group before it."""
        try:
            if before is not None:
                await asyncio.wait([before])
            try:
                await self.gang.settle()
            except TrainingError as death:  # if for want of memory, then of the group that runs now: this one had enough
                results = self._bury(list(works.values()), GangDiedError(death.what))
            going_on = _going_on(works, results)
            for result in results:
                self._settle(works[result.trial_id], result)
            self._queue.expect(going_on)
        except Exception as error:
            for work in works.values():
                work.fail(error)
            raise

    def _bury(self, group: Sequence[Work], death: TrainingError) -> list[RungResult]:
        """Leave a dead gang to be replaced; its work goes back to the queue, but for the failed results that are returned."""
        gang, failed = self.gang, []
        lived, gang.pids = bool(gang.pids), ()
        for work in group:
            known = len(work.notes)
            result = next_attempt(work, death, self._planned)
            if result is None:
                self._queue.put(work)
            else:
                failed.append(result)
            then = "; ".join(work.notes[known:]) or f"its assignment {'is dropped' if result else 'is requeued'}"
            self._tell("gang_died", f"{death.what}; {then}", gang=gang.index, trial_id=work.assignment.trial.trial_id)
        if lived:  # the group that was being written may have been buried before the one that ran
            self._figures.replaced += 1
            gang.kill()
        return failed


def _going_on(works: Mapping[str, Work], results: Sequence[RungResult]) -> list[RungResult]:
    """Of a group, the trials that may ask for their next rung."""
    return [result for result in results if result.state == "done" and not works[result.trial_id].future.done()]


class Tell(Protocol):
    """Writes an event down."""

    def __call__(self, kind: str, message: str, **fields: object) -> None: ...


async def start_gang(gang: Gang, figures: GangFigures, tell: Tell) -> None:
    """Until the gang is ready; what happened is told.

    Raises:
        Exception: what the last of MAX_ATTEMPTS starts raised.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            await gang.start()
            break
        except Exception as error:
            tell("gang_failed_to_start", f"gang {gang.index} could not start: {why_no_start(error)}", gang=gang.index)
            gang.kill()
            if attempt == MAX_ATTEMPTS:
                raise
    figures.base_loads = gang.base_loads
    figures.start_s.append(seconds := gang.start_seconds)
    ready = f"gang {gang.index} ready in {seconds:.1f} s"
    tell("gang_ready", ready, gang=gang.index, pids=list(gang.pids), seconds=round(seconds, 3))
