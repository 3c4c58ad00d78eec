"""The queue of work for the gangs: by priority, and in groups that share a batch."""

from __future__ import annotations

import asyncio
import bisect
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan.fusing import FuseKey, fuse_key
from orchestrator.plan.values import SweepPlan
from orchestrator.runtime.assignments import QueuedWork
from orchestrator.work.assignment import TrainRung
from orchestrator.work.results import RungResult

REUNION_S = 0.5
"""Maximum seconds that a free gang waits for trials that have just shared a batch: Tune decides on them one by one, within
milliseconds of each other, and a gang that did not wait would split the group."""


class WorkQueue:
    """A queue by priority. A gang takes the first piece of work and, with it, others that may share its batch.

    A group has at most `max_fused` members. If several gangs are free, none takes more than its equal share: of n trials that may
    share a batch, with g free gangs, n / g, rounded up. A starting gang counts as free.

    Args:
        plan: The search's plan; if its `max_fused` is 1, every piece of work forms a group of one and is never delayed.
        anatomy: The anatomy of the base.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self, plan: SweepPlan, anatomy: ModelAnatomy, num_gangs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._planned, self._anatomy = plan.execution, anatomy
        self._max_fused = plan.search.max_fused
        self._last_rung = len(plan.search.rung_steps) - 1
        self._num_free = num_gangs
        self._clock = clock
        self._works: list[QueuedWork] = []
        """Sorted by priority. Work whose caller no longer waits stays here until a gang next asks for work."""
        self._awaited: dict[str, tuple[int, float]] = {}
        """Awaited work by trial: the rung that it may request, and the time until which a gang waits for it."""
        self._fused_sizes: dict[int | None, int] = {}
        """Measured fused batch size by cut, if a gang has tried larger ones."""
        self._changed = asyncio.Event()

    def put(self, work: QueuedWork) -> None:
        bisect.insort(self._works, work)
        self._wake()

    def clear(self) -> list[QueuedWork]:
        """Empty the queue, and return the work that callers still wait for."""
        works, self._works = self._pending(), []
        return works

    @asynccontextmanager
    async def next_group(self, gang: int | None = None) -> AsyncIterator[list[QueuedWork]]:
        """Wait for the next group of work for a gang. The gang is busy while the block runs.

        Args:
            gang: The gang that asks: among equally urgent work it first gets trials whose state it may still hold.
        """
        group = await self._take(gang)
        self._num_free -= 1
        try:
            yield group
        finally:
            self._num_free += 1

    def lose_gang(self) -> None:
        """Remove a free gang, which will take no more work."""
        self._num_free -= 1

    def expect(self, results: Sequence[RungResult]) -> None:
        """Wait a moment for trials of a group that has ended: those that continue should share a batch again."""
        if len(results) > 1 and results[0].rung < self._last_rung:
            deadline = self._clock() + REUNION_S
            self._awaited.update({result.trial_id: (result.rung + 1, deadline) for result in results})

    def heard_from(self, trial_id: str) -> None:
        """Stop waiting for a trial: it has asked for its next rung, or has ended."""
        if self._awaited.pop(trial_id, None) is not None:
            self._wake()

    def note_fused_size(self, group: Sequence[QueuedWork], results: Sequence[RungResult]) -> None:
        """Limit later groups to the size that a gang has measured as fastest: trials that share no batch should wait here, for
        any gang. A gang tries batches of 1, 2, 4, ... trials.
        """
        size = max((result.engine.fused_trials for result in results if result.engine is not None), default=len(group))
        if 2 * size <= len(group):
            self._fused_sizes[_cut(group[0])] = size

    async def _take(self, gang: int | None) -> list[QueuedWork]:
        while True:
            self._works = self._pending()
            left = self._seconds_to_wait()
            if self._works and left <= 0:
                return self._pick(gang)
            try:
                await asyncio.wait_for(self._changed.wait(), left if self._works else None)
            except TimeoutError:
                continue

    def _pick(self, gang: int | None) -> list[QueuedWork]:
        # At equal priority, prefer work whose state this gang may hold in memory: it then starts without reading a checkpoint.
        works = sorted(self._works, key=lambda work: (work.priority[:2], work.home != gang, work.priority))
        first = works[0]
        key = self._key(first)
        alike = [work for work in works if key is not None and self._key(work) == key]
        even_part = math.ceil(len(alike) / self._num_free)
        fused_size = self._fused_sizes.get(_cut(first), self._max_fused)
        group = alike[: min(fused_size, even_part)] or [first]
        self._works = [work for work in self._works if work not in group]
        return group

    def _key(self, work: QueuedWork) -> FuseKey | None:
        """Return None for work that a gang failed on: it runs in a group of one, so that another failure has one cause."""
        return None if work.attempts else fuse_key(work.assignment, self._planned, self._anatomy)

    def _seconds_to_wait(self) -> float:
        """Return the seconds that a free gang still waits for trials to share a batch; 0 if the first work has a higher
        priority than those."""
        now = self._clock()
        first = self._works[0].priority[:2] if self._works else (math.inf, 0)
        return max((until - now for rung, until in self._awaited.values() if first >= (1, -rung)), default=0.0)

    def _wake(self) -> None:
        """Wake every waiting gang to check the queue again."""
        # A new event for the next wait: the old one stays set, and waiting for it again would return at once.
        self._changed.set()
        self._changed = asyncio.Event()

    def _pending(self) -> list[QueuedWork]:
        """Return the work that callers still wait for."""
        return [work for work in self._works if not work.future.done()]


def _cut(work: QueuedWork) -> int | None:
    """Return the cut of a trial (its first trainable block); None for work that shares no batch."""
    return work.assignment.selection.cut if isinstance(work.assignment, TrainRung) else None
