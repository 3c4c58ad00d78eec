"""Shares of a training set: seeded, nested, and stratified by class."""

from __future__ import annotations

import numpy as np

from orchestrator.data.batching import documents_of_steps
from orchestrator.data.rng import SHARES, generator
from orchestrator.data.sets import TokenizedSet
from orchestrator.plan.data_size import DataSize
from orchestrator.plan.schedule import share_documents


def documents_of_share(data: TokenizedSet, share: float, seed: int) -> np.ndarray:
    """Return int64: the documents of a share, ascending.

    A prefix of one seeded order, so that a larger share contains every smaller one. For classification the order interleaves
    the classes: the n-th of a class's N documents is placed at n / N, so that every prefix has about the class proportions of
    the whole set, and at least one document of every class if there are as many.
    """
    order = generator(seed, SHARES).permutation(len(data))
    turn = np.zeros(len(data))
    for label in np.unique(data.labels):
        own = order[data.labels[order] == label]
        # Interleaves the classes in proportion; without labels (all -1) this keeps the seeded order.
        turn[own] = np.arange(len(own)) / len(own)
    by_turns = order[np.argsort(turn[order], kind="stable")]
    return np.sort(by_turns[: share_documents(share, len(data))])


def size_of_share(size: DataSize, data: TokenizedSet, share: float, tokens_per_step: int, seed: int) -> DataSize:
    """Return the sizes that the plan needs, with only a share of `data` for training."""
    part = data.select(documents_of_share(data, share, seed))
    steps = documents_of_steps(part.offsets, tokens_per_step, seed, 0)
    update = {"train_documents": len(part), "train_tokens": part.num_tokens, "steps_per_epoch": len(steps)}
    return size.model_copy(update=update)
