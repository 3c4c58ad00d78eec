"""Measure how far two sets of documents lie apart in the frozen base's mean hidden states at each cut."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from orchestrator.data import TokenizedSet
from orchestrator.data.rng import FEATURES, generator
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.train.trunk.chunks import MemoryChunks
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.transfer.domain_shift import proxy_a_distance
from orchestrator.work.measurements import BlockShift, DomainShift, ShiftPlan


def measure_shift(
    plan: ShiftPlan,
    target: tuple[str, TokenizedSet],
    retention: tuple[str, TokenizedSet],
    trunk: TrunkLibrary,
    builder: TrunkBuilder,
    seed: int,
) -> DomainShift:
    """Measure the distance of two sets at each cut. Every rank gets the same answer.

    Args:
        target: Path and set, as the trunk knows it.
        retention: The retention set, in the same form.
        trunk: The stored activations, which are read at every cut of the plan.
        builder: Computes the other activations, from the base without a branch.
        seed: Seed of the choice of documents and of the folds.
    """
    started = time.perf_counter()
    sides = [_features(plan, path, data, trunk, builder, seed) for path, data in (target, retention)]
    try:
        blocks = tuple(_block(cut, sides[0][cut], sides[1][cut], seed) for cut in plan.cuts)
    except ValueError as error:
        return DomainShift(failed=str(error))
    return DomainShift(
        blocks=blocks,
        target_documents=len(sides[0][plan.cuts[0]]),
        retention_documents=len(sides[1][plan.cuts[0]]),
        seconds=time.perf_counter() - started,
    )


def _block(cut: int, target: np.ndarray, retention: np.ndarray, seed: int) -> BlockShift:
    distance, low, high = proxy_a_distance(target, retention, seed)
    return BlockShift(cut=cut, distance=distance, low=low, high=high)


def _features(
    plan: ShiftPlan, path: str, data: TokenizedSet, trunk: TrunkLibrary, builder: TrunkBuilder, seed: int
) -> dict[int, np.ndarray]:
    """Return float64[n, H] by cut, a row for each drawn document."""
    chosen = np.sort(generator(seed, FEATURES).permutation(len(data))[: plan.num_documents])
    stored = {cut: trunk.states(path, cut) for cut in plan.cuts}
    known: Mapping[int, TrunkStates] = {cut: states for cut, states in stored.items() if states is not None}
    if len(known) < len(stored):
        known = builder.build(data.select(chosen), {cut: MemoryChunks() for cut in plan.cuts})
        # The builder numbers the selected documents from 0.
        chosen = np.arange(len(chosen))
    return {
        cut: np.stack([states.document(int(index)).double().mean(0).numpy() for index in chosen]) for cut, states in known.items()
    }
