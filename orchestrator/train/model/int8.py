"""Weights of 8 bits: the codes and row scales of LLM.int8() (Dettmers et al. 2022, section 2.1), multiplied in the compute dtype.

bitsandbytes quantizes the weights. Its own product on a GPU quantizes the activations too, after looking for outliers in all rows
of a batch: a trial would compute other numbers in company than alone (law 10), and no merged weight could reproduce them (law 5).
So only the weights are in 8 bits here, as with nf4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class RowScales:
    """What gives the codes of a weight[out, in] their meaning."""

    absmax: torch.Tensor
    """float32[out]: the largest magnitude of each row, which the code 127 stands for."""

    dtype: torch.dtype
    """Compute dtype."""

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weight as it multiplies, computed in float32 and rounded once."""
        return (codes.float() * (self.absmax * (1.0 / 127.0))[:, None]).to(self.dtype)


def held_in_8_bits(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a weight[out, in] as training used them; each depends on itself alone.

    Args:
        rows: As stored.
        dtype: What training loaded them as, before quantizing, and computed in.
    """
    codes, absmax, _ = int8_vectorwise_quant(rows.to(dtype).to(torch.float16))
    return RowScales(absmax, dtype).dequantize(codes)


def use_weights_only(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the 8-bit layers of a loaded model multiply with dequantized weights; the scales become `weight.quant_state`."""
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            weight: Any = module.weight
            weight.quant_state = RowScales(weight.SCB, dtype)
            # A second name of the codes would keep them in memory where an engine partitions the parameter.
            weight.CB = None
            setattr(module, "forward", partial(_forward, module))  # noqa: B010 (an instance's own forward)


def _forward(layer: Linear8bitLt, inputs: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _Product.apply(inputs, layer)
    return product if layer.bias is None else product + layer.bias


class _Product(torch.autograd.Function):
    """inputs[..., in] @ weight[out, in].T. The weight is dequantized again in the backward pass instead of kept, and its codes
    are found through the layer: an engine that partitions them frees them in between."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: Linear8bitLt) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(inputs, _weight(layer))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ _weight(ctx.layer), None


def _weight(layer: Linear8bitLt) -> torch.Tensor:
    weight: Any = layer.weight
    scales: RowScales = weight.quant_state
    return scales.dequantize(weight.data)
