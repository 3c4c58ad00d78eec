"""Scoring the blocks: a few micro-batches forwards and backwards, and what the gradients of each block's matrices say.

Shapes: T tokens of a micro-batch, [out, in] a weight matrix. Nothing of the base requires a gradient meanwhile and nothing of
it is changed: a matrix's gradient is made of what its layer was given and of the gradient of what it gave, so that quantized
bases are scored like others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from orchestrator.data import MicroBatch, TokenizedSet, documents_of_steps
from orchestrator.errors import NonFiniteLossError, TrainingError
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.model.base import LoadedBase, dequantized
from orchestrator.train.model.objective import Objective
from orchestrator.train.model.recompute import recomputed
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.measurements import LayerScores, ProbePlan


@dataclass
class MatrixSums:
    """Running sums of the gradients of one matrix, of the same size for any number of micro-batches."""

    total: torch.Tensor | None = None
    """float32[out, in]: their sum."""
    squared_norms: float = 0.0
    """The sum of their squared norms."""
    num_added: int = 0

    def add(self, gradient: torch.Tensor) -> None:
        """Add the gradient of a micro-batch, which is not kept."""
        self.squared_norms += float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) ** 2
        self.total = gradient.float() if self.total is None else self.total.add_(gradient)
        self.num_added += 1


class _Tap(torch.autograd.Function):
    """Passes a linear layer's output on; in the backward pass the gradient of the layer's weight is made and handed over.

    The layer's input is saved as autograd saves tensors, so that gradient checkpointing computes it again and keeps none.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, inputs: torch.Tensor, take: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inputs,), (gradient,) = ctx.saved_tensors, gradients
        ctx.take(gradient.flatten(0, -2).T @ inputs.flatten(0, -2).to(gradient.dtype))
        return gradient, None, None


@dataclass
class BlockProbe:
    """Listens to the linear layers of the blocks from `floor` up while the context is open."""

    base: LoadedBase
    floor: int
    sums: dict[str, MatrixSums] = field(default_factory=dict)

    def __enter__(self) -> BlockProbe:
        self._undo = ExitStack()
        model, anatomy = self.base.model, self.base.anatomy
        blocks: list[nn.Module] = list(model.get_submodule(anatomy.blocks_module).children())
        self._undo.callback(blocks[self.floor].register_forward_pre_hook(_needs_gradient, with_kwargs=True).remove)
        # Hooks on the layers and not `requires_grad`: all weight gradients of the base at once would not fit in memory.
        for name in (name for block in anatomy.linears[self.floor :] for name in block):
            self.sums[name] = MatrixSums()
            layer = model.get_submodule(name.rpartition(".")[0])
            self._undo.callback(layer.register_forward_hook(_tapped(self.sums[name])).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def score(self, num_batches: int) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
        """Return (relative gradient norm, signal-to-noise ratio) of each block; see `score_blocks`."""
        norms: list[float | None] = [None] * self.floor
        ratios: list[float | None] = [None] * self.floor
        for names in self.base.anatomy.linears[self.floor :]:
            mean, squares, weights = 0.0, 0.0, 0.0
            for name in names:
                sums = self.sums[name]
                if sums.total is None or sums.num_added != num_batches:
                    found = f"{sums.num_added} gradients of {name} in {num_batches} micro-batches"
                    raise TrainingError(found, expected="one in each", remedy="search.probe: false, and no policy `top:`")
                mean += (float(torch.linalg.vector_norm(sums.total)) / num_batches) ** 2
                squares += sums.squared_norms
                weights += _squared_norm(self.base.model.get_parameter(name))
            variance = max(0.0, squares - num_batches * mean) / (num_batches - 1) if num_batches > 1 else 0.0
            norms.append(math.sqrt(mean / weights) if weights else 0.0)
            ratios.append(math.sqrt(mean / variance) if variance else None)
        return tuple(norms), tuple(ratios)


def score_blocks(
    base: LoadedBase, objective: Objective, data: TokenizedSet, plan: ProbePlan, execution: ExecutionPlan, seed: int
) -> LayerScores:
    """Score the blocks from `plan.floor` up on a few micro-batches of a set. Every rank computes the same result.

    With g_b the gradients of all of a block's matrices, laid end to end, of the mean loss of micro-batch b = 1..B, m their
    mean over the B micro-batches, and w the matrices' own elements (of a quantized base the dequantized ones):

    - relative gradient norm: |m| / |w| (Auto-RGN: Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution
      shifts");
    - signal-to-noise ratio: |m| / sqrt(sum over b of |g_b - m|^2 / (B - 1)). The same paper's Auto-SNR compares mean and
      variance element by element and averages; here both are summed over the block first, so that one sum and one number a
      matrix are all that is kept (the ratio's inverse square is the noise scale of McCandlish et al. 2018).

    Dropout is off. A matrix's gradient is let go of as soon as it is added: what stays is 4 bytes an element, whatever B.

    Args:
        base: The base, not in use by an open branch.
        objective: Objective of the base.
        data: The training set; micro-batches are drawn by the seed.
        execution: Limits a micro-batch to `micro_batch_rows` rows.

    Raises:
        NonFiniteLossError: a loss or a gradient is not finite.
        TrainingError: a block's matrix that no gradient reaches; ZeRO-3, under which no rank has a whole gradient.
    """
    if execution.executor == "deepspeed" and execution.zero_stage == 3:
        raise TrainingError("blocks are not scored under ZeRO-3: no rank has the whole gradient of a matrix")
    started = time.perf_counter()
    documents, tokens, count = set[int](), 0, 0
    was_training = objective.training
    # Without dropout, so that the scores depend only on base, data and seed.
    objective.eval()
    try:
        with ExitStack() as stack:
            probe = stack.enter_context(BlockProbe(base, plan.floor))
            if execution.checkpointing:
                stack.enter_context(_recomputed_without_dropout(base, plan.floor))
            for batch in probe_batches(
                data, plan, execution, seed, one_document_per_row=base.load.traits.head.one_document_per_row
            ):
                loss = objective(**to_tensors(batch, base.device)) / batch.num_supervised
                loss.backward()
                documents.update(int(document) for document in batch.document_ids.flatten() if document >= 0)
                tokens, count = tokens + batch.num_tokens, count + 1
            norms, ratios = probe.score(count)
    finally:
        objective.train(was_training)
    if not all(math.isfinite(value) for value in (*norms, *ratios) if value is not None):
        raise NonFiniteLossError("a gradient of the base model is not finite", remedy="train.dtype: float32")
    return LayerScores(
        relative_gradient_norms=norms,
        signal_to_noise=ratios,
        num_batches=count,
        num_documents=len(documents),
        num_tokens=tokens,
        seconds=time.perf_counter() - started,
        share_of_trial=plan.share_of_trial,
    )


def probe_batches(
    data: TokenizedSet, plan: ProbePlan, execution: ExecutionPlan, seed: int, *, one_document_per_row: bool
) -> Iterator[MicroBatch]:
    """Return the first micro-batches in the order of the seed, with no document in two of them; fewer if the set is small."""
    rows = min(plan.rows, execution.micro_batch_rows)
    layout = RowPlan(execution.row_tokens, rows, execution.pack and not one_document_per_row, pads=execution.pads)
    for documents in documents_of_steps(data.offsets, rows * layout.row_tokens, seed, epoch=0)[: plan.num_batches]:
        yield layout.batches(data, documents if layout.pack else documents[:rows])[0]


def _needs_gradient(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the input of the lowest scored block require a gradient: the backward pass ends there, and the blocks below keep no
    activations."""
    if args:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}


def _tapped(sums: MatrixSums) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], Any]:
    def tap(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        return _Tap.apply(output, args[0].detach(), sums.add)

    return tap


def _squared_norm(weight: nn.Parameter) -> float:
    """Return the squared norm of a matrix as it is applied: a quantized one dequantized."""
    return float(torch.linalg.vector_norm(dequantized(weight), dtype=torch.float32)) ** 2


@contextmanager
def _recomputed_without_dropout(base: LoadedBase, floor: int) -> Iterator[None]:
    """Turn on gradient checkpointing from a block up. A block applies it only in train mode; the modules inside it, which have
    the dropout, stay in eval mode."""
    blocks = list(base.model.get_submodule(base.anatomy.blocks_module).children())[floor:]
    with recomputed(blocks):
        for block in blocks:
            block.training = True
        yield
