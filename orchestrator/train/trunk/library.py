"""The stored trunk activations of a process: every set that trials read, at every cut of the plan."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrator.data import TokenizedSet
from orchestrator.store import cache_folder
from orchestrator.train.batches import RowPlan
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import Objective
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.build import TrunkBuilder, trunk_key
from orchestrator.train.trunk.cache import TrunkCache
from orchestrator.train.trunk.chunks import Chunks, DiskChunks, MemoryChunks
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.work.execution import DataPaths, TrunkPlan

MEMORY_SHARE = 0.25
"""Share of the free memory that stored states may use if no disk has room."""


def default_folder() -> Path:
    """Return the folder of stored hidden states on this machine."""
    return cache_folder() / "trunk"


class TrunkLibrary:
    """Hidden states by set and cut, made at first use and kept as long as the process lives.

    Args:
        base: With no branch open while `open` is called.
        fingerprint: Hashes of the base's tensors by name; of this rank's parts where weights are partitioned.
        ranks: This process among those of its gang.
        load_set: A tokenised set by its path.
    """

    def __init__(
        self, base: LoadedBase, fingerprint: Mapping[str, str], ranks: Ranks, load_set: Callable[[str], TokenizedSet]
    ) -> None:
        self._base = base
        self._fingerprint = fingerprint
        self._ranks = ranks
        self._load_set = load_set
        self._cache: TrunkCache | None = None
        self._states: dict[tuple[str, int], TrunkStates] = {}
        self._refused = False

    def open(
        self,
        plan: TrunkPlan,
        data: DataPaths,
        rows: RowPlan,
        objective: Objective,
        *,
        partitioned: bool,
        note: Callable[[str], None],
    ) -> float:
        """Read or make what is not there yet. Called on every rank.

        Args:
            plan: Cuts and budget.
            data: The sets.
            rows: How documents share the rows of the forward pass.
            objective: Objective of the base without a branch.
            partitioned: Whether ZeRO-3 holds the base in parts, so that ranks compute together.
            note: Called with a sentence about every deviation from the plan.

        Returns:
            Seconds that it took.
        """
        started = time.perf_counter()
        # A dictionary and not a set: every rank must open the sets in the same order.
        paths = dict.fromkeys(path for path in (data.train, data.eval, data.retain, data.replay) if path)
        wanted = [path for path in paths if any((path, cut) not in self._states for cut in plan.cuts)]
        if not wanted or self._refused:
            return 0.0
        builder = TrunkBuilder(self._base, objective, rows, self._ranks, partitioned)
        for path in wanted:
            tokens = self._load_set(path)
            chunks = self._chunks(plan, tokens, rows, note, partitioned=partitioned)
            if chunks is None:
                continue
            made: dict[int, TrunkStates] = {}
            failure = ""
            try:
                made = builder.build(tokens, chunks)
            except (OSError, RuntimeError, MemoryError) as error:
                if partitioned:  # the other ranks are waiting in a collective
                    raise
                failure = f"{type(error).__name__}: {error}"
            failures = [each for each in self._ranks.gather(failure) if each]
            if failures:
                note(f"the trunk is not stored: {failures[0]}")
                self._refused = True
                break
            for cut, states in made.items():
                self._states[path, cut] = states
        return time.perf_counter() - started

    def states(self, path: str, cut: int) -> TrunkStates | None:
        """Return the stored states of a set at a cut; None if there are none."""
        return self._states.get((path, cut))

    def close(self) -> None:
        """Release the disk space, so that other sweeps may use it."""
        if self._cache is not None:
            self._cache.close()

    def _chunks(
        self, plan: TrunkPlan, tokens: TokenizedSet, rows: RowPlan, note: Callable[[str], None], *, partitioned: bool
    ) -> dict[int, Chunks] | None:
        """Return the store of each cut: on disk if it has room, for other processes and later sweeps; else in memory if that
        has room; else None, on every rank."""
        num_bytes = tokens.num_tokens * self._base.anatomy.hidden_size * self._base.dtype.itemsize
        folders = self._folders(plan, tokens, rows, num_bytes, note, partitioned=partitioned)
        without = sum(folder is None for folder in folders)
        fits = without * num_bytes <= MEMORY_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        where = "kept in memory" if fits else "not stored: not enough free memory either"
        if without:
            note(f"{without} of {len(folders)} stored trunks have no room on disk and are {where}")
        # The ranks decide together: batches with and without stored states would not meet in the same collectives.
        if not all(self._ranks.gather(fits)):
            return None
        return {
            cut: MemoryChunks() if folder is None else DiskChunks(folder, self._base.anatomy.hidden_size, self._base.dtype)
            for cut, folder in zip(plan.cuts, folders, strict=True)
        }

    def _folders(
        self,
        plan: TrunkPlan,
        tokens: TokenizedSet,
        rows: RowPlan,
        num_bytes: int,
        note: Callable[[str], None],
        *,
        partitioned: bool,
    ) -> Sequence[Path | None]:
        fingerprint = self._fingerprint
        if partitioned:
            fingerprint = {
                f"rank {rank} {name}": part
                for rank, parts in enumerate(self._ranks.gather(dict(fingerprint)))
                for name, part in parts.items()
            }
        if self._cache is None:
            self._cache = TrunkCache(Path(plan.folder) if plan.folder else default_folder(), plan.max_bytes)
        keys = [trunk_key(self._base, fingerprint, tokens, cut, rows) for cut in plan.cuts]
        try:
            return [self._cache.open(key, num_bytes) for key in keys]
        except OSError as error:
            note(f"the stored trunk's folder cannot be used: {error}")
            return [None] * len(plan.cuts)
