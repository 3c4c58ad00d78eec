"""Stored hidden states of one set at one cut, arranged as the rows of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.data import MicroBatch, TokenizedSet, joined


@dataclass(frozen=True)
class TrunkStates:
    """Every document of a set, at its own positions, whatever it shares a row with."""

    data: TokenizedSet
    cut: int
    borders: np.ndarray
    """int64[C + 1]: piece c holds documents borders[c] to borders[c + 1]."""
    pieces: Sequence[torch.Tensor]
    """[N_c, H] each, on the CPU."""

    def document(self, index: int) -> torch.Tensor:
        """Return the states [tokens, H] of one document."""
        piece = int(np.searchsorted(self.borders, index, side="right")) - 1
        first = int(self.data.offsets[self.borders[piece]])
        return self.pieces[piece][int(self.data.offsets[index]) - first : int(self.data.offsets[index + 1]) - first]

    def rows(self, batch: MicroBatch) -> torch.Tensor:
        """Return [B, L, H]: the input of block `cut` for this micro-batch of the set; zeros where a row is padded."""
        shape = (*batch.input_ids.shape, self.pieces[0].shape[1])
        hidden = torch.zeros(shape, dtype=self.pieces[0].dtype)
        for row, (owners, length) in enumerate(zip(batch.document_ids, batch.lengths, strict=True)):
            start = 0
            while start < length:
                document = self.document(int(owners[start]))
                hidden[row, start : start + len(document)] = document
                start += len(document)
        return hidden


def chosen_states(states: TrunkStates, documents: np.ndarray) -> TrunkStates:
    """Return the states of these documents only, numbered as `TokenizedSet.select` does; nothing is copied."""
    # Views of the stored pieces, one per document.
    pieces = [states.document(int(index)) for index in documents]
    return TrunkStates(states.data.select(documents), states.cut, np.arange(len(pieces) + 1), pieces)


def joined_states(first: TrunkStates, second: TrunkStates) -> TrunkStates:
    """Return the states of both sets' documents at one cut, numbered as `data.joined` does."""
    assert first.cut == second.cut
    borders = np.concatenate([first.borders, first.borders[-1] + second.borders[1:]])
    return TrunkStates(joined(first.data, second.data), first.cut, borders, [*first.pieces, *second.pieces])
