"""Split tokenised sets into the micro-batches of each step: the same documents whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import torch

from orchestrator.data import (
    MicroBatch,
    TokenizedSet,
    documents_of_steps,
    joined,
    micro_batches,
    pack_rows,
    replayed_documents,
)
from orchestrator.data.batching import width_of
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.work.execution import ExecutionPlan


@dataclass
class StepPlan:
    """The steps of a trial: which documents each holds. A pure function of the sets, the step size, the share and the seed."""

    data: TokenizedSet
    """The target's documents and, after them, those that are replayed."""
    tokens_per_step: int
    """Tokens of the target; replayed ones come on top."""
    seed: int
    replay: float = 0.0
    """Share of replayed tokens among all."""
    num_replayed: int = 0
    """Documents at the end of `data` that are replayed."""
    _epochs: dict[int, list[np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, target: TokenizedSet, replayed: TokenizedSet | None, tokens_per_step: int, seed: int, replay: float) -> StepPlan:
        """With `replay` of 0 nothing is replayed, whatever there is."""
        if not replay or replayed is None:
            return cls(target, tokens_per_step, seed)
        return cls(joined(target, replayed), tokens_per_step, seed, replay, len(replayed))

    def epoch(self, number: int) -> list[np.ndarray]:
        """Return the target's documents of every step of an epoch."""
        if number not in self._epochs:
            # The replayed documents follow the target's in the joined set; epochs cover only the target.
            borders = self.data.offsets[: len(self.data.offsets) - self.num_replayed]
            self._epochs[number] = documents_of_steps(borders, self.tokens_per_step, self.seed, number)
        return self._epochs[number]

    def steps_from(self, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (epoch, documents) of every step after the first `step` ones, endlessly."""
        return islice(self._with_replay() if self.num_replayed else self._target_steps(), step, None)

    def _target_steps(self) -> Iterator[tuple[int, np.ndarray]]:
        for epoch in count():
            for documents in self.epoch(epoch):
                yield epoch, documents

    def _with_replay(self) -> Iterator[tuple[int, np.ndarray]]:
        first = len(self.data) - self.num_replayed
        tokens = (int(self.data.lengths[documents].sum()) for _, documents in self._target_steps())
        replayed = replayed_documents(self.data.lengths[first:], tokens, self.replay, self.seed)
        for (epoch, documents), more in zip(self._target_steps(), replayed, strict=False):
            yield epoch, np.concatenate([documents, first + more])


@dataclass(frozen=True)
class RowPlan:
    """The rule that packs documents into rows, and rows into the micro-batches of one rank."""

    row_tokens: int
    rows_per_micro_batch: int
    pack: bool
    rank: int = 0
    num_ranks: int = 1
    one_shape: bool = False
    """True if all full micro-batches are padded to the longest row, and so have one shape."""
    pads: bool = True
    """False if no row may be padded: then a micro-batch has one row."""

    @classmethod
    def of(cls, execution: ExecutionPlan, rank: int, *, one_document_per_row: bool) -> RowPlan:
        """Return how `execution` lays out rows on this rank."""
        pack = execution.pack and not one_document_per_row
        return cls(execution.row_tokens, execution.micro_batch_rows, pack, rank, execution.ranks, pads=execution.pads)

    def batches(self, data: TokenizedSet, documents: np.ndarray) -> list[MicroBatch]:
        """Return this rank's micro-batches, the same number on every rank."""
        rows = pack_rows(data.lengths, documents, self.row_tokens, self.pack)
        width = width_of(self.row_tokens) if self.one_shape else 0
        return micro_batches(data, rows, self.rank, self.num_ranks, self.rows_per_micro_batch, width, pads=self.pads)


def to_tensors(batch: MicroBatch, device: torch.device, trunk: TrunkStates | None = None) -> dict[str, torch.Tensor]:
    """Return the arguments of `Objective.forward`, on `device`; with a trunk also the input of the block at its cut."""
    arrays = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "labels": batch.labels,
        "document_ids": batch.document_ids,
        "class_labels": batch.class_labels,
        "lengths": batch.lengths,
    }
    tensors = {name: torch.as_tensor(np.asarray(array, dtype=np.int64)) for name, array in arrays.items()}
    if trunk is not None:
        tensors["hidden"] = trunk.rows(batch)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def repeated(tensors: dict[str, torch.Tensor], num_trials: int) -> dict[str, torch.Tensor]:
    """Repeat the rows once for each trial, one copy after the other."""
    if num_trials == 1:
        return tensors
    return {name: tensor.repeat(num_trials, *(1,) * (tensor.ndim - 1)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class StepInput:
    """One rank's share of a step."""

    epoch: int
    num_tokens: int
    num_supervised: int
    micro_batches: list[dict[str, torch.Tensor]]
    """Arguments of `Objective.forward`, on the CPU."""


def step_inputs(steps: StepPlan, rows: RowPlan, first: int, stop: int, trunk: TrunkStates | None = None) -> Iterator[StepInput]:
    """Yield the steps after the first `first` ones up to and including `stop`, each prepared while the previous one is
    computed."""
    upcoming = islice(steps.steps_from(first), stop - first)

    def prepare() -> StepInput | None:
        found = next(upcoming, None)
        if found is None:
            return None
        epoch, documents = found
        batches = rows.batches(steps.data, documents)
        tensors = [to_tensors(batch, torch.device("cpu"), trunk) for batch in batches]
        return StepInput(epoch, sum(b.num_tokens for b in batches), sum(b.num_supervised for b in batches), tensors)

    with ThreadPoolExecutor(1, thread_name_prefix="step-inputs") as worker:
        ready = worker.submit(prepare)
        while (step := ready.result()) is not None:
            ready = worker.submit(prepare)
            yield step
