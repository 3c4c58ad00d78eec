"""Supervision of one gang: it takes new work while earlier results are being written, and is replaced when it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from orchestrator.errors import TrainingError
from orchestrator.run.activities import activity_of
from orchestrator.runtime.assignments import MAX_ATTEMPTS, GangFigures, QueuedWork, next_attempt, with_history
from orchestrator.runtime.gang import Gang, GangDiedError, why_no_start
from orchestrator.runtime.work_queue import WorkQueue
from orchestrator.transfer.run_view import Activity
from orchestrator.work.assignment import Work
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.results import RungResult, WorkResult


class Supervisor:
    """Serves one gang, from its first work to the end.

    The gang has at most two groups of work: one that runs, and the previous one, whose rungs are being written. When the gang
    fails, both are requeued, and each trial starts again from its last rung on disk.

    Args:
        gang: Not started.
        planned: The execution that the plan gives every trial.
        queue: The source of work.
        figures: Receives the time that the gang spends.
        refuses: Returns True for work that the limit on GPU-hours does not allow.
        settle: Records a result, whose rung is on disk, and answers the caller that waits for it.
        emit: Records an event.
    """

    def __init__(
        self,
        gang: Gang,
        planned: ExecutionPlan,
        queue: WorkQueue,
        figures: GangFigures,
        refuses: Callable[[Work], bool],
        settle: Callable[[QueuedWork, WorkResult], None],
        emit: Emit,
    ) -> None:
        self.gang = gang
        self._planned = planned
        self._queue = queue
        self._figures = figures
        self._refuses = refuses
        self._settle = settle
        self._emit = emit
        self._writing: asyncio.Task[None] | None = None
        self._running: Sequence[QueuedWork] = ()

    def activities(self) -> tuple[Activity, ...]:
        """Return what the gang is doing now; empty while it is idle."""
        if self.gang.starting:
            return (Activity(doing=self.gang.starting, gang=self.gang.index),)
        return tuple(activity_of(work.assignment, self.gang.index) for work in self._running)

    async def serve(self) -> None:
        """Start the gang, run work and answer it; restart the gang when it fails. Raises what the last failed start raised."""
        idle_since: float | None = None
        while True:
            if not self.gang.pids:
                await self.written()
                await start_gang(self.gang, self._figures, self._emit)
            async with self._queue.next_group(self.gang.index) as group:
                if group[0].attempts:  # a gang failed running it: run it with nothing else in progress
                    await self.written()
                if not self.gang.pids:  # it failed while writing the previous group
                    idle_since = None
                    for work in group:
                        self._queue.put(work)
                    continue
                if self._refuses(group[0].assignment):
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
        """Wait until the previous group has been answered or requeued. Raises what ending the gang raised."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    async def _run(self, group: Sequence[QueuedWork]) -> float:
        """Run a group and start to write its results; if the gang fails, requeue the group and let the gang be replaced.

        Returns:
            The time at which the gang finished computing (monotonic clock); writing of the results may still be in progress.
        """
        works = {work.assignment.work_id: work for work in group}
        started = time.monotonic()
        self._running = group
        try:
            answers, failure = await self._answers(group)
        finally:
            self._running = ()
        answered_at = time.monotonic()
        self._figures.busy_s += answered_at - started
        if failure is not None:
            await self.written()
            for result in self._requeue_or_fail(group, failure):
                self._settle(works[result.work_id], result)
            return answered_at
        results = [with_history(result, works[result.work_id], self._planned) for result in answers]
        self._queue.note_fused_size(group, [result for result in results if isinstance(result, RungResult)])
        self._queue.expect(_continuing(works, results))
        # Created before anything is awaited, so that the results are written even if this task is cancelled.
        before, self._writing = self._writing, asyncio.create_task(self._write(self._writing, works, results))
        if before is not None:
            await asyncio.wait([before])
            before.result()
        if group[0].attempts:
            await self.written()
        return answered_at

    async def _answers(self, group: Sequence[QueuedWork]) -> tuple[list[WorkResult], TrainingError | None]:
        """Return the gang's results, or the error that it failed with."""
        try:
            return await self.gang.run([work.assignment for work in group]), None
        except TrainingError as failure:
            return [], failure

    async def _write(
        self, before: asyncio.Task[None] | None, works: Mapping[str, QueuedWork], results: Sequence[WorkResult]
    ) -> None:
        """Answer each member of a group once its checkpoint is on disk, after the group before it."""
        try:
            if before is not None:
                await asyncio.wait([before])
            try:
                await self.gang.settle()
            except (
                TrainingError
            ) as failure:  # out of memory: the group that runs now is the cause, because this one has already been trained
                results = self._requeue_or_fail(list(works.values()), GangDiedError(failure.what))
            continuing = _continuing(works, results)
            for result in results:
                self._settle(works[result.work_id], result)
            self._queue.expect(continuing)
        except Exception as error:
            for work in works.values():
                work.fail(error)
            raise

    def _requeue_or_fail(self, group: Sequence[QueuedWork], failure: TrainingError) -> list[WorkResult]:
        """Mark a failed gang for replacement and requeue its work; return the results of work that is not retried."""
        gang, failed = self.gang, []
        lived, gang.pids = bool(gang.pids), ()
        for work in group:
            known = len(work.notes)
            result = next_attempt(work, failure, self._planned)
            if result is None:
                self._queue.put(work)
            else:
                failed.append(result)
            then = "; ".join(work.notes[known:]) or f"its assignment {'is dropped' if result else 'is requeued'}"
            self._emit("gang_died", f"{failure.what}; {then}", gang=gang.index, trial_id=work.assignment.work_id)
        if lived:  # the group that was being written may have been requeued before the one that ran
            self._figures.replaced += 1
            gang.kill()
        return failed


def _continuing(works: Mapping[str, QueuedWork], results: Sequence[WorkResult]) -> list[RungResult]:
    """Return the results of a group whose trials may request their next rung."""
    rungs = [result for result in results if isinstance(result, RungResult)]
    return [result for result in rungs if result.state == "done" and not works[result.work_id].future.done()]


class Emit(Protocol):
    """Records an event."""

    def __call__(self, kind: str, message: str, **fields: object) -> None: ...


async def start_gang(gang: Gang, figures: GangFigures, emit: Emit) -> None:
    """Start a gang, with retries, and wait until it is ready; record every outcome as an event.

    Raises:
        Exception: the error of the last of MAX_ATTEMPTS starts.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            await gang.start()
            break
        except Exception as error:
            emit("gang_failed_to_start", f"gang {gang.index} could not start: {why_no_start(error)}", gang=gang.index)
            gang.kill()
            if attempt == MAX_ATTEMPTS:
                raise
    figures.base_loads = gang.base_loads
    figures.start_s.append(seconds := gang.start_seconds)
    ready = f"gang {gang.index} ready in {seconds:.1f} s"
    emit("gang_ready", ready, gang=gang.index, pids=list(gang.pids), seconds=round(seconds, 3))
