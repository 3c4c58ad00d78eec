"""Checkpoints written beside the training, and what is remembered of them for the trials' next rungs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.store import free_memory_bytes
from orchestrator.train.checkpoint.resume import StartPoint, drop_old_checkpoints
from orchestrator.train.checkpoint.snapshot import Snapshot, state_bytes, write_snapshot
from orchestrator.train.ranks import Ranks

MEMORY_SHARE = 0.25
"""Share of the memory left free by the plan that unwritten checkpoints and cached states may use, in all gangs of a node
together."""


@dataclass(frozen=True)
class _Write:
    """A checkpoint on its way to the disk."""

    final: Path
    num_bytes: int
    done: Future[None]


@dataclass(frozen=True)
class _Remembered:
    """A rung that its trial may go on from."""

    point: StartPoint
    seed: int
    layout: str
    num_bytes: int


class Saver:
    """The checkpoints of one process: one thread writes them, in the order in which they are given.

    A trial's state at its last rung is remembered, so that its next rung begins without a file being read. What waits to be
    written and what is remembered share a bound, the gang's part of MEMORY_SHARE of the memory that is free once the gangs
    have grown to what the plan expects. Where a checkpoint does not fit, first the states that were not asked for longest are
    forgotten, then earlier checkpoints are waited for, and at last it is written before `save` returns: nothing of it is held.
    Of several ranks none remembers, for they would have to agree.

    A write that failed is raised by every later call: the process has to be replaced.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writes: list[_Write] = []
        """Replaced, never changed, for `settle` may be called by another thread."""
        self._remembered: dict[Path, _Remembered] = {}
        """Cached states by the checkpoint's folder, least recently used first."""

    def save(
        self,
        final: Path,
        snapshot: Snapshot,
        ranks: Ranks,
        *,
        together: bool,
        rung: bool = False,
        growth_bytes: int = 0,
        num_gangs: int = 1,
    ) -> None:
        """Have `final` written; checkpoints on the way that are too old go once it stands. Called on every rank.

        Args:
            together: Whether every rank writes its own part, with collectives: that is not done beside the training.
            rung: Whether the trial ends its rung here, and may begin another one from here.
            growth_bytes: Of host memory, what this process is going to take beyond what it has.
            num_gangs: Processes like this one that may share the node's memory.

        Raises:
            CheckpointError: this checkpoint could not be written, or an earlier one.
        """
        if together:
            _write(final, snapshot, ranks)
            return
        if not ranks.first:
            return
        self._raise_failures()
        if rung:
            self._forget_trial(final.parent)
        fits = self._make_room(snapshot.num_bytes, growth_bytes, num_gangs)
        done = self._thread.submit(_write, final, snapshot, replace(ranks, count=1))
        self._writes = [*self._writes, _Write(final, snapshot.num_bytes, done)]
        if not fits:
            done.result()
        elif rung and snapshot.rank_states and ranks.count == 1:
            point = StartPoint(final, snapshot.state, exact=True, remembered=snapshot.rank_states[0])
            self._remembered[final] = _Remembered(point, snapshot.seed, snapshot.layout, state_bytes(snapshot.rank_states))

    def find(self, folder: Path, *, seed: int, layout: str) -> StartPoint | None:
        """Return the cached state of a rung; None if it has to be read from disk."""
        found = self._remembered.pop(folder, None)
        if found is None:
            return None
        self._remembered[folder] = found
        return found.point if (found.seed, found.layout) == (seed, layout) else None

    def settle(self, trial_folder: Path | None = None) -> None:
        """Wait until everything submitted so far is written, or only one trial's part of it. Callable from any thread.

        Raises:
            CheckpointError: something could not be written.
        """
        for write in self._writes:
            if trial_folder is None or write.final.parent == trial_folder:
                write.done.result()

    def forget(self) -> None:
        """Drop all cached states: every trial starts its next rung from the files."""
        self._remembered.clear()

    def give_up(self) -> bool:
        """Write what waits, and forget the rest: whether anything was held.

        Raises:
            CheckpointError: something could not be written.
        """
        held = self.held_bytes > 0
        self.settle()
        self.forget()
        return held

    def close(self) -> None:
        """Write what waits, and forget the rest."""
        self._thread.shutdown()
        self.forget()

    @property
    def held_bytes(self) -> int:
        """Return the bytes of unwritten and of cached states; one that is both counts twice."""
        waiting = sum(write.num_bytes for write in self._waiting())
        return waiting + sum(remembered.num_bytes for remembered in self._remembered.values())

    def _waiting(self) -> list[_Write]:
        return [write for write in self._writes if not write.done.done()]

    def _raise_failures(self) -> None:
        """Raise the errors of finished writes; one that fails a moment later is raised by the next call."""
        waiting: list[_Write] = []
        for write in self._writes:
            if write.done.done():
                write.done.result()
            else:
                waiting.append(write)
        self._writes = waiting

    def _make_room(self, num_bytes: int, growth_bytes: int, num_gangs: int) -> bool:
        """Return whether so many bytes, already allocated, may be held; evict cached states for them."""
        free = free_memory_bytes() + self.held_bytes + num_bytes - growth_bytes * num_gangs
        while self.held_bytes + num_bytes > MEMORY_SHARE * free / num_gangs:
            if self._remembered:
                del self._remembered[next(iter(self._remembered))]
            elif waiting := self._waiting():
                waiting[0].done.result()
            else:
                return False
        return True

    def _forget_trial(self, trial_folder: Path) -> None:
        """Its earlier rung is behind it."""
        self._remembered = {folder: kept for folder, kept in self._remembered.items() if folder.parent != trial_folder}


def _write(final: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    try:
        write_snapshot(final, snapshot, ranks)
        if ranks.first:
            drop_old_checkpoints(final.parent, snapshot.state.step)
    except OrchestratorError:
        raise
    except Exception as error:  # heard by whoever asks next, maybe another trial: it must be no trial's own failure
        what = f"the checkpoint could not be written: {type(error).__name__}: {error}"
        raise CheckpointError(
            what, where=str(final), remedy="free space or grant write permission there; the gang is replaced"
        ) from error
