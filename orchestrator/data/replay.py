"""Choose the retention documents that are replayed with each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from orchestrator.data.rng import REPLAY, generator


def replayed_documents(lengths: np.ndarray, target_tokens: Iterable[int], share: float, seed: int) -> Iterator[np.ndarray]:
    """Yield for every step of the target the documents that are replayed with it.

    Documents are drawn in a seeded order, every one once before any comes again. After each step the replayed tokens of all
    steps so far are `share` of all tokens so far, to within half of a document: the next steps
    compensate for a step that has too few or too many.

    Args:
        lengths: int64[D], tokens of each document that may be replayed; each at least 1.
        target_tokens: Training tokens of the target in each step.
        share: Share of replayed tokens among all, above 0 and below 1.

    Yields:
        int64 indices into `lengths`, maybe none.
    """
    wanted, taken = 0.0, 0
    upcoming = _endless(len(lengths), seed)
    document = next(upcoming)
    for tokens in target_tokens:
        wanted += tokens * share / (1.0 - share)
        step: list[int] = []
        # Taken if at least half of it is due: the error stays within half a document, without drifting.
        while taken + lengths[document] / 2 <= wanted:
            step.append(document)
            taken += int(lengths[document])
            document = next(upcoming)
        yield np.asarray(step, dtype=np.int64)


def _endless(count: int, seed: int) -> Iterator[int]:
    """Yield every index once, in a seeded order, then repeat the same order."""
    order = generator(seed, REPLAY).permutation(count).tolist()
    while True:
        yield from order
