"""A share of a training set: seeded, each share within every larger one, of each class its part."""

from __future__ import annotations

import numpy as np

from orchestrator.data.batching import documents_of_steps
from orchestrator.data.rng import SHARES, generator
from orchestrator.data.sets import TokenizedSet
from orchestrator.plan.data_size import DataSize
from orchestrator.plan.schedule import share_documents


def documents_of_share(data: TokenizedSet, share: float, seed: int) -> np.ndarray:
    """int64: the documents of a share, rising.

    A prefix of one seeded order, so that a larger share holds every smaller one. To classify, the order takes the classes by
    turns: the n-th of a class's N documents comes at n / N, so that every prefix has about as much of each class as the whole
    set, and every class at least one document where there are as many.
    """
    order = generator(seed, SHARES).permutation(len(data))
    turn = np.zeros(len(data))
    for label in np.unique(data.labels):
        own = order[data.labels[order] == label]
        turn[own] = np.arange(len(own)) / len(own)
    by_turns = order[np.argsort(turn[order], kind="stable")]
    return np.sort(by_turns[: share_documents(share, len(data))])


def size_of_share(size: DataSize, data: TokenizedSet, share: float, tokens_per_step: int, seed: int) -> DataSize:
    """What a plan needs to know of a set, with only a share of `data` to train on."""
    part = data.select(documents_of_share(data, share, seed))
    steps = documents_of_steps(part.offsets, tokens_per_step, seed, 0)
    update = {"train_documents": len(part), "train_tokens": part.num_tokens, "steps_per_epoch": len(steps)}
    return size.model_copy(update=update)
