"""One forward pass over a set for the hidden states that are missing, at every cut at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import cast

import numpy as np
import torch
import transformers
from torch import nn

from orchestrator.data import MicroBatch, TokenizedSet
from orchestrator.train import heartbeat
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import Objective
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.cache import piece_lock
from orchestrator.train.trunk.chunks import Chunks, DiskChunks, chunk_borders
from orchestrator.train.trunk.port import leaving
from orchestrator.train.trunk.states import TrunkStates

FORMAT = 1
logger = logging.getLogger(__name__)


def trunk_key(base: LoadedBase, fingerprint: Mapping[str, str], data: TokenizedSet, cut: int, rows: RowPlan) -> str:
    """Return a hash of all that determines the hidden states of `data` at `cut`: the weights below it and their quantization,
    the model's configuration, the dtype, the tokens and their documents, the kind of device and the libraries. On a GPU also
    the rows that documents share, which change the last bits there (on CPUs each document is computed separately).

    Args:
        fingerprint: Hashes of the base's tensors by name, see `integrity.base_fingerprint`.
    """
    above = tuple(f"{base.anatomy.block_prefix.format(number)}" for number in range(cut, base.anatomy.num_blocks))
    outside = (base.anatomy.head_weight, base.anatomy.classifier_weight, *base.anatomy.final_norm)
    below = {n: h for n, h in fingerprint.items() if not n.startswith(above) and n not in outside} if above else dict(fingerprint)
    identity = {
        "format": FORMAT,
        "config": base.anatomy.config_sha256,
        "weights": sorted(below.items()),
        "quantize": base.load.quantize,
        "dtype": str(base.dtype),
        "cut": cut,
        "tokens": data.tokens_sha256,
        "device": base.device.type,
        "rows": None if base.device.type == "cpu" else (rows.row_tokens, rows.rows_per_micro_batch, rows.pack),
        "versions": (torch.__version__, transformers.__version__),
    }
    return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass
class _Filling:
    """The pieces of a set at every cut that exist so far."""

    data: TokenizedSet
    borders: np.ndarray
    """int64[C + 1]: piece c holds documents borders[c] to borders[c + 1]."""
    chunks: Mapping[int, Chunks]
    """The store of each cut."""
    _found: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False)
    """[N_c, H] by cut and number of the piece."""

    @property
    def num_pieces(self) -> int:
        return len(self.borders) - 1

    def documents(self, number: int) -> np.ndarray:
        return np.arange(int(self.borders[number]), int(self.borders[number + 1]))

    def missing(self, number: int) -> list[int]:
        """Return the cuts at which this piece is missing."""
        return [cut for cut in self.chunks if (cut, number) not in self._found]

    def pieces(self, cut: int) -> list[torch.Tensor]:
        """Return all pieces, in order."""
        return [self._found[cut, number] for number in range(self.num_pieces)]

    def look(self, number: int) -> None:
        """Take the stored states of a piece, whichever process wrote them."""
        first, last = self.data.offsets[self.borders[[number, number + 1]]]
        for cut in self.missing(number):
            stored = self.chunks[cut].get(number, int(last - first))
            if stored is not None:
                self._found[cut, number] = stored

    def keep(self, number: int, made: Mapping[int, torch.Tensor]) -> None:
        """Keep a piece, in memory if it cannot be written and read again: an error here would leave the other ranks waiting."""
        for cut, states in made.items():
            try:
                self.chunks[cut].put(number, states)
            except OSError as error:
                logger.warning("piece %d of the stored trunk stays in memory: %s", number, error)
        self.look(number)
        self._found |= {(cut, number): made[cut] for cut in self.missing(number) if cut in made}


@dataclass
class TrunkBuilder:
    """Computes the missing hidden states of a set. With partitioned weights all ranks call it together."""

    base: LoadedBase
    objective: Objective
    rows: RowPlan
    ranks: Ranks
    partitioned: bool

    def build(self, data: TokenizedSet, chunks: Mapping[int, Chunks]) -> dict[int, TrunkStates]:
        """Build the missing pieces and return the states by cut.

        Args:
            chunks: The chunks by cut; DiskChunks may be shared with other processes, which make other pieces meanwhile.
        """
        filling = _Filling(data, chunk_borders(data.offsets, self.base.anatomy.hidden_size * self.base.dtype.itemsize), chunks)
        for number in range(filling.num_pieces):
            filling.look(number)
        # Without dropout, as training computes what lies below a cut.
        self.objective.eval()
        try:
            if self.partitioned:
                self._make_together(filling)
            else:
                self._make(filling)
        finally:
            self.objective.train()
        return {cut: TrunkStates(data, cut, filling.borders, filling.pieces(cut)) for cut in chunks}

    def _make(self, filling: _Filling) -> None:
        """Make the pieces that no other process is making; then wait for the others' pieces, or make them if those are gone."""
        # First without waiting: processes that start together then make different pieces rather than queue for the same one.
        for wait in (False, True):
            for number in range(filling.num_pieces):
                if not filling.missing(number):
                    continue
                with _lock(filling.chunks, number, wait=wait) as mine:
                    if not mine:
                        continue
                    # Another process may have made it between the look above and the lock.
                    filling.look(number)
                    if cuts := filling.missing(number):
                        filling.keep(number, self._compute(filling.data, filling.documents(number), cuts))

    def _make_together(self, filling: _Filling) -> None:
        """Run the same micro-batches on every rank (ZeRO-3 gathers each matrix from all); each keeps its missing pieces."""
        # All ranks must run the same forward passes, and each may find other pieces in its own node's cache.
        mine = {number for number in range(filling.num_pieces) if filling.missing(number)}
        for number in sorted(set().union(*self.ranks.gather(mine))):
            made = self._compute(filling.data, filling.documents(number), sorted(filling.chunks))
            filling.keep(number, {cut: made[cut] for cut in filling.missing(number)})

    @torch.no_grad()
    def _compute(self, data: TokenizedSet, documents: np.ndarray, cuts: Sequence[int]) -> dict[int, torch.Tensor]:
        """Compute [N, H] of these documents, one after another, at each of these cuts."""
        blocks = cast("nn.ModuleList", self.base.model.get_submodule(self.base.anatomy.blocks_module))
        first = int(data.offsets[documents[0]])
        shape = (int(data.offsets[documents[-1] + 1]) - first, self.base.anatomy.hidden_size)
        made = {cut: torch.empty(shape, dtype=self.base.dtype) for cut in cuts}
        rows = replace(self.rows, rank=0, num_ranks=1, one_shape=False)
        with leaving(blocks, cuts) as taken:
            for batch in rows.batches(data, documents):
                heartbeat.beat()
                tensors = to_tensors(batch, self.ranks.device)
                self.objective.run_blocks(tensors["input_ids"], tensors["position_ids"], tensors["lengths"])
                for row, start, end, place in _documents(batch, data):
                    for cut in cuts:
                        made[cut][place - first : place - first + end - start] = taken[cut][row, start:end].cpu()
        return made


def _documents(batch: MicroBatch, data: TokenizedSet) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, start, end, first token in the set) of every document of a micro-batch."""
    for row, (owners, length) in enumerate(zip(batch.document_ids, batch.lengths, strict=True)):
        start = 0
        while start < length:
            document = int(owners[start])
            end = start + int(data.lengths[document])
            yield row, start, end, int(data.offsets[document])
            start = end


def _lock(chunks: Mapping[int, Chunks], number: int, *, wait: bool) -> AbstractContextManager[bool]:
    """Lock a piece for all cuts by the lowest one's lock; a piece in memory needs none."""
    first = chunks[min(chunks)]
    return piece_lock(first.folder, number, wait=wait) if isinstance(first, DiskChunks) else nullcontext(True)
