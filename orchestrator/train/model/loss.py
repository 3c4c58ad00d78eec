"""Cross entropy of a projection onto the vocabulary, with its gradients made in the forward pass.

Logits are the widest tensors of a step, and the loss is the last thing that a forward pass computes: their gradient can be
computed at once, after which they are not needed. So they are made a chunk of positions at a time, become
their own gradient in place, and go; they are never computed twice (Hsu et al. 2024, "Liger Kernel", section 3.2).

Shapes: S supervised positions, H hidden size, V vocabulary, G groups of equally many positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from orchestrator.plan.memory.transient import LOGIT_PIECE_BYTES


class LogitMap(NamedTuple):
    """What a class does with its output projection's result: cap * tanh(scale * z / cap), or scale * z without a cap."""

    scale: float = 1.0
    cap: float = 0.0
    """0 for none."""

    def __call__(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the logits of the projection's result, of the same shape."""
        logits = projected if self.scale == 1.0 else projected * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    @property
    def is_identity(self) -> bool:
        return self == (1.0, 0.0)


AS_PROJECTED = LogitMap()


def is_plain(head: nn.Module) -> bool:
    """Return whether a head is one complete matrix: no adapter on it, not quantized, not partitioned across ranks."""
    return type(head) is nn.Linear and not any(hasattr(parameter, "ds_tensor") for parameter in head.parameters())


def linear_cross_entropy(
    head: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk_rows: int,
    num_groups: int = 1,
    logit_map: LogitMap = AS_PROJECTED,
) -> torch.Tensor:
    """Return float32[G]: the summed cross entropy of each group, in nats.

    A group's sum and gradients are computed from its own positions only, in chunks that begin where it begins: they are
    the same bits whatever other groups there are.

    Args:
        head: A plain one (`is_plain`), of hidden's dtype. If it is trainable there must be one group: gradients of a weight are
            sums over positions, and could not be scaled group by group.
        hidden: [S, H], each group's positions together.
        targets: int64[S].
        chunk_rows: Positions whose logits are there at once.
        num_groups: G.
        logit_map: What follows the projection.

    Raises:
        ValueError: S is not a multiple of G, or there are several groups and a trainable head.
    """
    if hidden.shape[0] % num_groups:
        raise ValueError(f"{hidden.shape[0]} positions are not {num_groups} groups of equally many")
    if num_groups > 1 and any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(f"a trainable head has one group, not {num_groups}")
    chunks = _Chunks(chunk_rows, num_groups, logit_map)
    return _LinearCrossEntropy.apply(hidden, head.weight, head.bias, targets, chunks)  # type: ignore[no-any-return]


class _Chunks(NamedTuple):
    """How `linear_cross_entropy` goes through the positions; see its arguments."""

    rows: int
    num_groups: int
    logit_map: LogitMap


def token_losses(
    projected: torch.Tensor, targets: torch.Tensor, logit_map: LogitMap = AS_PROJECTED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (float32[S] cross entropies in nats, int64[S] likeliest entries) of projected[S, V]; for scoring, without gradients.

    What follows the projection is computed a piece at a time: there is never a second tensor of its size.
    """
    rows = _piece_rows(projected)
    losses, predictions = [], []
    for part, wanted in zip(projected.split(rows), targets.split(rows), strict=True):
        piece = logit_map(part)
        log_probabilities = torch.log_softmax(piece, dim=-1, dtype=torch.float32)
        losses.append(-log_probabilities.gather(1, wanted[:, None])[:, 0])
        predictions.append(piece.argmax(-1))
    return torch.cat(losses), torch.cat(predictions)


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. What it keeps for the backward pass are the gradients themselves, to be scaled there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunks: _Chunks,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad
        chunk_rows, num_groups, logit_map = chunks
        hidden_gradient = torch.empty_like(hidden) if wanted[0] else None
        group_rows = hidden.shape[0] // num_groups
        several = group_rows > chunk_rows
        weight_sum = _Sum(weight, several=several) if wanted[1] else None
        bias_sum = _Sum(bias, several=several) if bias is not None and wanted[2] else None
        sums = []
        for group in range(num_groups):
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            start, end = group * group_rows, (group + 1) * group_rows
            for first in range(start, end, chunk_rows):
                rows = slice(first, min(first + chunk_rows, end))
                logits = functional.linear(hidden[rows], weight, bias)
                # From here on `logits` holds their gradient.
                total += _into_gradient(logits, targets[rows], logit_map)
                if hidden_gradient is not None:
                    hidden_gradient[rows] = logits @ weight
                if weight_sum is not None:
                    weight_sum.add(logits.T @ hidden[rows])
                if bias_sum is not None:
                    bias_sum.add(logits.sum(0))
                # Before the next chunk's are made: at most one chunk of logits is in memory.
                del logits
            sums.append(total)
        ctx.save_for_backward(hidden_gradient, weight_sum and weight_sum.rounded(), bias_sum and bias_sum.rounded())
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias = ctx.saved_tensors
        scales = outer[0].unbind()
        if hidden is not None:
            groups = hidden.unflatten(0, (len(scales), hidden.shape[0] // len(scales))).unbind()
            hidden = torch.cat([group * scale for group, scale in zip(groups, scales, strict=True)])
        learnt = [None if gradient is None else gradient * scales[0] for gradient in (weight, bias)]
        return hidden, *learnt, None, None


class _Sum:
    """The gradient of a parameter, in its dtype, summed over chunks: in float32 where there are several."""

    def __init__(self, parameter: torch.Tensor, *, several: bool) -> None:
        self._parameter = parameter
        self._several = several
        self._total: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        if self._total is None:
            self._total = part.float() if self._several else part
        else:
            self._total += part

    def rounded(self) -> torch.Tensor:
        return torch.zeros_like(self._parameter) if self._total is None else self._total.to(self._parameter.dtype)


def _into_gradient(projected: torch.Tensor, targets: torch.Tensor, logit_map: LogitMap) -> torch.Tensor:
    """Return the summed cross entropy of projected[n, V], and overwrite each number by its gradient: softmax, less 1 at the
    target, times the slope of `logit_map` there, which is scale * (1 - (logit / cap)^2).

    It works in pieces, so that the float32 intermediate stays within the processor's cache.
    """
    total = torch.zeros((), dtype=torch.float32, device=projected.device)
    rows = _piece_rows(projected)
    for piece, wanted in zip(projected.split(rows), targets.split(rows), strict=True):
        at_targets = wanted[:, None]
        logits = piece if logit_map.is_identity else logit_map(piece.float())
        values = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        total -= values.gather(1, at_targets).sum()
        values.exp_().scatter_add_(1, at_targets, values.new_full(at_targets.shape, -1.0))
        if logit_map.cap:
            values.mul_(logits.div_(logit_map.cap).square_().neg_().add_(1.0))
        if logit_map.scale != 1.0:
            values.mul_(logit_map.scale)
        piece.copy_(values)
    return total


def _piece_rows(logits: torch.Tensor) -> int:
    return max(1, LOGIT_PIECE_BYTES // (4 * logits.shape[-1]))
