"""Checkpoints written in the background during training, and their states kept in memory for the trials' next rungs."""

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
    """A cached rung from which its trial can continue."""

    point: StartPoint
    seed: int
    layout: str
    num_bytes: int


class Saver:
    """The checkpoints of one process, written by one thread in the order of submission.

    A trial's state at its last rung is cached in memory, so that its next rung starts without reading a file. Unwritten
    checkpoints and cached states share a bound: the gang's part of MEMORY_SHARE of the memory that is free once the gangs have
    grown to their planned size. If a checkpoint does not fit, first the least recently used states are dropped, then earlier
    writes are awaited, and finally it is written before `save` returns and not held at all. With several ranks nothing is
    cached, since they would have to agree.

    The error of a failed write is raised by every later call: the process has to be replaced.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writes: list[_Write] = []
        """Replaced, never changed in place, since another thread may be in `settle`."""
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
        """Write `final`, in the background if possible; old intermediate checkpoints are deleted once it is complete. Called on
        every rank.

        Args:
            together: Whether every rank writes its own part, with collectives: then not in the background.
            rung: Whether this ends a rung, from which the trial may continue.
            growth_bytes: Host memory that this process will still allocate.
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
        # With a single rank: a collective from this thread would meet those of the training on the other ranks.
        done = self._thread.submit(_write, final, snapshot, replace(ranks, count=1))
        self._writes = [*self._writes, _Write(final, snapshot.num_bytes, done)]
        if not fits:
            done.result()
        elif rung and snapshot.rank_states and ranks.count == 1:
            point = StartPoint(final, snapshot.state, exact=True, remembered=snapshot.rank_states[0])
            self._remembered[final] = _Remembered(point, snapshot.seed, snapshot.layout, state_bytes(snapshot.rank_states))

    def find(self, folder: Path, *, seed: int, layout: str) -> StartPoint | None:
        """Return the cached state of a rung; None if it has to be read from disk."""
        # Taken out and put back at the end: the dictionary's order is that of the last use.
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
        """Write what is pending and drop the cached states; return whether anything was held.

        Raises:
            CheckpointError: something could not be written.
        """
        held = self.held_bytes > 0
        self.settle()
        self.forget()
        return held

    def close(self) -> None:
        """Write what is pending and drop the cached states."""
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
        """Drop the cached state of a trial's earlier rung."""
        self._remembered = {folder: kept for folder, kept in self._remembered.items() if folder.parent != trial_folder}


def _write(final: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    try:
        write_snapshot(final, snapshot, ranks)
        if ranks.first:
            drop_old_checkpoints(final.parent, snapshot.state.step)
    except OrchestratorError:
        raise
    except Exception as error:  # raised by the next call, maybe another trial's: so not as a trial's own failure
        what = f"the checkpoint could not be written: {type(error).__name__}: {error}"
        raise CheckpointError(
            what, where=str(final), remedy="free space or grant write permission there; the gang is replaced"
        ) from error
