"""Few-shot prompts: examples in the prompt of an untrained base."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from orchestrator.data.rng import SHOTS, generator
from orchestrator.data.sets import TokenizedSet, build_set


class WithShots(NamedTuple):
    """Set whose documents begin with examples."""

    data: TokenizedSet
    fewest: int
    """Fewest examples of any document."""
    mean: float


def with_shots(data: TokenizedSet, examples: TokenizedSet, num_shots: int, limit: int, seed: int) -> WithShots:
    """Prefix each document of `data` with `num_shots` whole documents of `examples`, which are read and not scored.

    Each document has its own examples, drawn by the seed, so that the comparison does not depend on one choice. It gets fewer if
    not all fit: those drawn are added in turn if they fit. The supervised tokens stay the same.

    Args:
        data: The documents to answer: each has a supervised token.
        examples: Documents of the same task, none of which is in `data`.
        num_shots: Maximum number of examples in a prompt.
        limit: Tokens of the longest document that the base can read.
        seed: Seed of the draws.
    """
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    counts: list[int] = []
    random = generator(seed, SHOTS)
    for index in range(len(data)):
        ids, supervised = data.document(index)
        room = limit - len(ids)
        chosen: list[np.ndarray] = []
        # Examples that are too long are skipped rather than ending the search, so that short ones can still fit.
        for example in random.permutation(len(examples)).tolist():
            shot = examples.document(example)[0]
            if len(shot) <= room:
                chosen.append(shot)
                room -= len(shot)
            if len(chosen) == num_shots or room <= 0:
                break
        before = sum(map(len, chosen))
        documents.append((np.concatenate([*chosen, ids]), np.concatenate([np.zeros(before, bool), supervised])))
        counts.append(len(chosen))
    built = build_set(documents, labels=data.labels.tolist(), rows=data.rows.tolist())
    return WithShots(
        replace(built, prompts=data.prompts, answers=data.answers, stop_ids=data.stop_ids), min(counts), float(np.mean(counts))
    )
