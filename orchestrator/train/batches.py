"""From tokenised sets to the micro-batches of a step: the same documents whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from orchestrator.data import MicroBatch, TokenizedSet, documents_of_steps, micro_batches, pack_rows
from orchestrator.data.batching import width_of
from orchestrator.plan.values import ExecutionPlan
from orchestrator.train.trunk.states import TrunkStates


@dataclass
class StepPlan:
    """The steps of a trial: which documents each holds. A pure function of the set, the step size and the seed."""

    data: TokenizedSet
    tokens_per_step: int
    seed: int
    _epochs: dict[int, list[np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def epoch(self, number: int) -> list[np.ndarray]:
        if number not in self._epochs:
            self._epochs[number] = documents_of_steps(self.data.offsets, self.tokens_per_step, self.seed, number)
        return self._epochs[number]

    def steps_from(self, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, documents) of every step after the first `step` ones, without end."""
        epoch = 0
        while step >= len(self.epoch(epoch)):
            step -= len(self.epoch(epoch))
            epoch += 1
        while True:
            for documents in self.epoch(epoch)[step:]:
                yield epoch, documents
            step, epoch = 0, epoch + 1


@dataclass(frozen=True)
class RowPlan:
    """How documents become rows and rows become the micro-batches of one rank."""

    row_tokens: int
    rows_per_micro_batch: int
    pack: bool
    rank: int = 0
    num_ranks: int = 1
    one_shape: bool = False
    """Whether all full micro-batches are as wide as a row may be, and so of one shape."""

    @classmethod
    def of(cls, execution: ExecutionPlan, rank: int, *, classify: bool) -> RowPlan:
        """Documents that are classified stand alone in their rows."""
        pack = execution.pack and not classify
        return cls(execution.row_tokens, execution.micro_batch_rows, pack, rank, execution.ranks)

    def batches(self, data: TokenizedSet, documents: np.ndarray) -> list[MicroBatch]:
        """This rank's share, the same number of micro-batches on every rank."""
        rows = pack_rows(data.lengths, documents, self.row_tokens, self.pack)
        width = width_of(self.row_tokens) if self.one_shape else 0
        return micro_batches(data, rows, self.rank, self.num_ranks, self.rows_per_micro_batch, width)


def to_tensors(batch: MicroBatch, device: torch.device, trunk: TrunkStates | None = None) -> dict[str, torch.Tensor]:
    """The arguments of `Objective.forward`, on `device`; with a trunk also what enters the block at its cut."""
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
    """The rows once for each trial, one copy under the other."""
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
    """The steps after the first `first` ones up to and including `stop`, each made while the one before it is computed."""
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
