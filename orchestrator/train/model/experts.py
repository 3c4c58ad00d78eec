"""Routed experts: the matrices of all experts of a layer are one parameter, and every row of the input has its expert.

transformers' classes hand the products of their experts to a function that is registered by name (`experts_implementation`).
The one here computes what transformers' `grouped_mm` does, with two differences. A low-rank adapter of each expert is applied to
the rows themselves, so that no adapted copy of the weights is made. And only parameters, not views of them, are kept for the
backward pass: under ZeRO-3, a view would keep the gathered weights of every layer in memory.

Shapes: N tokens of k experts each, S = N k rows sorted by expert, E experts, r the rank. A weight is [E, out, in], or
[E, in, out] if the class multiplies from the left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ADAPTED = "adapted"
"""The name under which transformers finds the function (`experts_implementation`)."""
ADAPTERS = "expert_adapters"
"""Attribute of an experts module while it runs: `ExpertAdapter` by the name of its parameter."""
ALIGNMENT = 8
"""CUDA's grouped products take rows of whole 16 bytes: a rank is filled up with zeros to a multiple of 8."""


class ExpertAdapter(NamedTuple):
    """Low-rank adapters of the experts of one parameter, in PEFT's layout (`peft.tuners.lora.ParamWrapper`)."""

    a: torch.Tensor
    """[E r, in], expert by expert."""
    b: torch.Tensor
    """[out, r E]: the experts of each column of B."""
    scale: float


def factors(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A as [E, r, in] and B as [E, out, r]: views of PEFT's two matrices."""
    return a.view(num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)


def _experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute hidden_states[N, H] -> [N, H], as transformers' `grouped_mm_experts_forward` does.

    Args:
        self: A module of experts, as `use_experts_implementation` describes it.
        top_k_index: int64[N, k].
        top_k_weights: [N, k].
    """
    num_top_k = top_k_index.size(-1)
    expert_ids, order = torch.sort(top_k_index.reshape(-1))
    counted = expert_ids.float() if hidden_states.device.type == "cpu" else expert_ids.int()
    counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    rows = hidden_states[order // num_top_k]
    if self.has_gate:
        inner = self._apply_gate(_projection(self, "gate_up_proj", rows, offsets, expert_ids))
    else:
        inner = self.act_fn(_projection(self, "up_proj", rows, offsets, expert_ids))
    out = _projection(self, "down_proj", inner, offsets, expert_ids)
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    weighted = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.size(0), device=order.device)
    summed = weighted[back].view(hidden_states.size(0), num_top_k, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _projection(module: Any, name: str, rows: torch.Tensor, offsets: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Return rows[S, in] multiplied by the matrices of their experts, with bias and adapters: [S, out]."""
    weight: nn.Parameter = getattr(module, name)
    adapter: ExpertAdapter | None = getattr(module, ADAPTERS, {}).get(name)
    a, b, scale = adapter or (None, None, 0.0)
    out: torch.Tensor = _GroupedLinear.apply(rows.to(weight.dtype), weight, a, b, offsets, module.is_transposed, scale)  # type: ignore[no-untyped-call]
    return out + getattr(module, f"{name}_bias")[expert_ids] if module.has_bias else out


class _GroupedLinear(torch.autograd.Function):
    """Rows [S, in] times the matrix of each row's expert, plus scale * B A of its adapter, if there is one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        offsets: torch.Tensor,
        transposed: bool,
        scale: float,
    ) -> torch.Tensor:
        out = functional.grouped_mm(rows, weight if transposed else weight.mT, offs=offsets)
        low = None
        if a is not None and b is not None:
            each_a, each_b = _aligned(a, b, weight.shape[0])
            low = functional.grouped_mm(rows, each_a.mT, offs=offsets)
            out.add_(functional.grouped_mm(low, each_b.mT, offs=offsets), alpha=scale)
        kept = rows if a is not None or ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight, a, b, low, offsets)
        ctx.transposed, ctx.scale = transposed, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows, weight, a, b, low, offsets = ctx.saved_tensors
        gradient, grad_rows, grad_weight, grad_a, grad_b = outer[0].contiguous(), None, None, None, None
        if ctx.needs_input_grad[0]:
            grad_rows = functional.grouped_mm(gradient, weight.mT if ctx.transposed else weight, offs=offsets)
        if ctx.needs_input_grad[1]:
            left, right = (rows, gradient) if ctx.transposed else (gradient, rows)
            grad_weight = _by_expert(left, right, offsets)
        if a is not None:
            num_experts, num_rank = weight.shape[0], a.shape[0] // weight.shape[0]
            each_a, each_b = _aligned(a, b, num_experts)
            grad_low = functional.grouped_mm(gradient, each_b, offs=offsets).mul_(ctx.scale)
            if grad_rows is not None:
                grad_rows.add_(functional.grouped_mm(grad_low, each_a, offs=offsets))
            grad_a = _by_expert(grad_low, rows, offsets)[:, :num_rank].reshape(a.shape)
            each_grad_b = _by_expert(gradient, low, offsets)[:, :, :num_rank].mul_(ctx.scale)
            grad_b = each_grad_b.permute(1, 2, 0).reshape(b.shape)
        return grad_rows, grad_weight, grad_a, grad_b, None, None, None


def _aligned(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A as [E, r, in] and B as [E, out, r], contiguous, with the rank filled up to whole alignments."""
    each_a, each_b = factors(a, b, num_experts)
    missing = -each_a.shape[1] % ALIGNMENT
    if missing:
        return functional.pad(each_a, (0, 0, 0, missing)), functional.pad(each_b, (0, missing))
    return each_a, each_b.contiguous()


def _by_expert(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return left[S, m] transposed times right[S, n] for the rows of each expert [E, m, n]; zeros for one without rows."""
    products = functional.grouped_mm(left.mT, right, offs=offsets)
    empty = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
    return products.masked_fill_(empty[:, None, None], 0.0)


def is_grouped(module: nn.Module) -> bool:
    """Return whether transformers hands the products of this module of experts to the function registered here."""
    config: Any = getattr(module, "config", None)
    return hasattr(module, "has_gate") and getattr(config, "_experts_implementation", None) == ADAPTED


ALL_EXPERTS_FUNCTIONS.register(ADAPTED, _experts_forward)
