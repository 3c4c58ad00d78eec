"""From documents to steps, from steps to rows, from rows to each rank's micro-batches. Pure arithmetic on arrays.

A step is a fixed list of documents: it depends on the set, the step's size, the seed and the epoch, never on the
number of ranks. How a step's documents share rows, and which rank computes which row, is decided after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.data.rng import generator
from orchestrator.data.sets import TokenizedSet

UNSUPERVISED = -100
"""Label that cross-entropy ignores."""
WIDTH_MULTIPLE = 8
"""Rows are padded to a multiple of this many tokens: efficient on tensor cores and vector units, and few distinct shapes."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B rows of L tokens that one rank computes at once. An empty one (all padding) fills a rank's last rounds."""

    input_ids: np.ndarray
    """int64[B, L]"""
    position_ids: np.ndarray
    """int64[B, L]: from 0 in every document; transformers makes the block-diagonal mask from the restarts."""
    labels: np.ndarray
    """int64[B, L]: the token to be predicted *at* this position, already shifted; UNSUPERVISED elsewhere."""
    document_ids: np.ndarray
    """int64[B, L]: index of the document in the set; -1 for padding."""
    class_labels: np.ndarray
    """int64[B]: the row's class; -1 without one."""
    lengths: np.ndarray
    """int64[B]: tokens of each row without padding."""

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_supervised(self) -> int:
        """Predictions that the loss counts; for classification, documents."""
        classified = int((self.class_labels >= 0).sum())
        return classified or int((self.labels != UNSUPERVISED).sum())


def documents_of_steps(offsets: np.ndarray, tokens_per_step: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the documents of every step of an epoch.

    A seeded order, cut wherever the next document would bring the step over `tokens_per_step` tokens.

    Args:
        offsets: int64[D + 1], document borders.
        tokens_per_step: Tokens of a step at most; a document longer than that is a step of its own.

    Returns:
        One int64 array of document indices a step; together every document once.
    """
    lengths = np.diff(offsets)
    order = generator(seed, epoch).permutation(len(lengths))
    steps: list[np.ndarray] = []
    start, tokens = 0, 0
    for position, document in enumerate(order):
        length = int(lengths[document])
        if position > start and tokens + length > tokens_per_step:
            steps.append(order[start:position])
            start, tokens = position, 0
        tokens += length
    if start < len(order):
        # The last, smaller step is kept: every document is trained on once per epoch.
        steps.append(order[start:])
    return steps


def pack_rows(lengths: np.ndarray, documents: Sequence[int] | np.ndarray, row_tokens: int, pack: bool) -> list[list[int]]:
    """Return lists of documents that share a row of at most `row_tokens` tokens: first-fit, longest first; no document is cut.

    Args:
        lengths: int64[D], tokens of every document of the set.
        documents: Which documents to pack.
        pack: Without it every document has a row of its own.
    """
    if not pack:
        return [[int(document)] for document in documents]
    # First-fit decreasing needs about 11/9 of the optimal number of rows, and is deterministic.
    ordered = sorted((int(document) for document in documents), key=lambda document: -int(lengths[document]))
    rows: list[list[int]] = []
    space: list[int] = []
    for document in ordered:
        length = int(lengths[document])
        place = next((row for row, free in enumerate(space) if free >= length), None)
        if place is None:
            rows.append([document])
            space.append(row_tokens - length)
        else:
            rows[place].append(document)
            space[place] -= length
    return rows


def micro_batches(
    data: TokenizedSet,
    rows: list[list[int]],
    rank: int,
    num_ranks: int,
    rows_per_micro_batch: int,
    full_width: int = 0,
    *,
    pads: bool = True,
) -> list[MicroBatch]:
    """Return one rank's share of `rows` as micro-batches; every rank gets the same number of them.

    Rows are assigned longest first, back and forth over the ranks, so that shares have about equal tokens. A rank whose share
    ends early gets empty micro-batches, since collective operations need all ranks. A micro-batch is as wide as its longest
    row; a full one has `full_width`, if given, so that all full ones have one shape.

    Args:
        pads: False for micro-batches that are exactly as wide as their longest row.
    """
    tokens = [int(sum(data.lengths[document] for document in row)) for row in rows]
    longest_first = sorted(range(len(rows)), key=lambda index: -tokens[index])
    share = [row for turn, row in enumerate(longest_first) if _owner(turn, num_ranks) == rank]
    rounds = -(-max(1, -(-len(rows) // num_ranks)) // rows_per_micro_batch)
    cuts = [share[start * rows_per_micro_batch : (start + 1) * rows_per_micro_batch] for start in range(rounds)]
    return [
        _micro_batch(data, [rows[index] for index in cut], full_width if len(cut) == rows_per_micro_batch else 0, pads=pads)
        for cut in cuts
    ]


def width_of(longest: int) -> int:
    """Return the tokens that a row of `longest` tokens is padded to."""
    return max(WIDTH_MULTIPLE, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def _owner(turn: int, num_ranks: int) -> int:
    """Return the rank of a turn: 0 1 2 2 1 0 0 1 2 ... (boustrophedon order)."""
    lap, place = divmod(turn, num_ranks)
    return place if lap % 2 == 0 else num_ranks - 1 - place


def _micro_batch(data: TokenizedSet, rows: list[list[int]], least_width: int = 0, *, pads: bool = True) -> MicroBatch:
    lengths = np.asarray([sum(int(data.lengths[document]) for document in row) for row in rows] or [0], dtype=np.int64)
    longest = int(lengths.max())
    width = max(least_width, width_of(longest) if pads or not longest else longest)
    shape = (len(lengths), width)
    batch = MicroBatch(
        input_ids=np.zeros(shape, np.int64),
        position_ids=np.zeros(shape, np.int64),
        labels=np.full(shape, UNSUPERVISED, np.int64),
        document_ids=np.full(shape, -1, np.int64),
        class_labels=np.full(len(lengths), -1, np.int64),
        lengths=lengths,
    )
    for index, row in enumerate(rows):
        _fill_row(batch, index, data, row)
        # Padding restarts at 0, so that it forms a block of its own in the mask.
        batch.position_ids[index, lengths[index] :] = np.arange(width - lengths[index])
    if not rows:
        batch.position_ids[0] = np.arange(width)
    return batch


def _fill_row(batch: MicroBatch, index: int, data: TokenizedSet, row: list[int]) -> None:
    start = 0
    for document in row:
        ids, supervised = data.document(document)
        end = start + len(ids)
        batch.input_ids[index, start:end] = ids
        batch.position_ids[index, start:end] = np.arange(len(ids))
        batch.document_ids[index, start:end] = document
        # Shifted here, so that the loss needs no shift; a document's last position predicts nothing.
        batch.labels[index, start : end - 1] = np.where(supervised[1:], ids[1:], UNSUPERVISED)
        batch.class_labels[index] = data.labels[document]
        start = end
