"""The computation of each kind of adapter: initial values, forward pass, merge. `spec.adapters` has their shapes and sizes.

Shapes: T trials, N tokens of each, a frozen weight W [out, in], r the rank.
Tensors are named by the suffixes of `AdapterKind.shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from orchestrator.spec.adapters import ADAPTER_KINDS, LORA_A, LORA_B, LORA_MAGNITUDE, AdapterName, Shape

Tensors = Mapping[str, torch.Tensor]
MergeRows = Callable[[torch.Tensor, slice], torch.Tensor]
"""A function of rows of W in float32 and of their slice in W; returns the same rows with the adapter merged, in float32."""
LORA = ADAPTER_KINDS["lora"]
PIECE_ELEMENTS = 2**20
"""Elements of a weight that are converted to float32 at a time while its rows' norms are computed."""


@dataclass(frozen=True)
class LayerPass:
    """One call of a frozen layer: the tensors that the adapters of T trials need."""

    inputs: torch.Tensor
    """Input of the adapters [T, N, in]: the layer's own input, after dropout if there is any."""
    outputs: torch.Tensor
    """Output of the frozen layer for its own input [T, N, out]."""
    outputs_of_inputs: torch.Tensor
    """Output of the frozen layer for `inputs` [T, N, out]; `outputs` itself unless the kind reads W and dropout is used."""
    bias: torch.Tensor | None
    row_norms: torch.Tensor | None
    """Result of `LiveLora.row_norms` [T, out]; None if the kind does not read the weight."""


class LiveLora:
    """W + scale * B @ A (Hu et al. 2021), and the base class of the other kinds."""

    reads_weight = False
    """True if the forward pass needs W itself, not only the output of the frozen layer."""

    def initial(
        self, shape: Shape, lora_rank: int, generator: Callable[[str], torch.Generator], weight: Callable[[], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return initial values, which do not change the layer's output.

        A is uniform(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5, as Hu et al. 2021 and PEFT do); B is zero.

        Args:
            shape: Shape of W, [out, in] or [experts, out, in].
            generator: Returns the random generator of a tensor, by its suffix.
            weight: Returns W in the compute dtype; called only if the kind reads the weight.
        """
        bound, shapes = shape[-1] ** -0.5, LORA.shapes(shape, lora_rank)
        a = torch.empty(shapes[LORA_A]).uniform_(-bound, bound, generator=generator(LORA_A))
        return {LORA_A: a, LORA_B: torch.zeros(shapes[LORA_B])}

    def row_norms(self, weight: torch.Tensor, tensors: Tensors, scale: float) -> torch.Tensor:
        """Return the numbers derived from W that the forward pass needs [T, out]; called while W is unpartitioned."""
        raise NotImplementedError

    def forward(self, call: LayerPass, tensors: Tensors, scale: float) -> torch.Tensor:
        """Return the output of the layer with the adapters of each of T trials [T, N, out].

        Args:
            tensors: Tensors of all trials, stacked along a first dimension T.
        """
        return _with_product(call.outputs, call.inputs, tensors, scale)

    def merger(self, tensors: Tensors, scale: float, dtype: torch.dtype) -> MergeRows:
        """Return the function that merges one weight row by row.

        Args:
            tensors: The stored tensors; B is memory-mapped from its file.
            dtype: The compute dtype of training.
        """
        a, b = tensors[LORA_A].float(), tensors[LORA_B]
        return lambda rows, which: torch.addmm(rows, b[which].float(), a, alpha=scale)


class LiveDora(LiveLora):
    """m * V / |V| with V = W + scale * B @ A and |V| the norm of each row, held constant (Liu et al. 2024, section 4.3).

    A row's norm is rounded to the compute dtype, as the magnitude m is: before the first step their ratio is exactly one.
    """

    reads_weight = True

    def initial(
        self, shape: Shape, lora_rank: int, generator: Callable[[str], torch.Generator], weight: Callable[[], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        plain, frozen = super().initial(shape, lora_rank, generator, weight), weight()
        stacked = {suffix: tensor.to(frozen.device)[None] for suffix, tensor in plain.items()}
        return plain | {LORA_MAGNITUDE: self.row_norms(frozen, stacked, 1.0)[0]}

    @torch.no_grad()
    def row_norms(self, weight: torch.Tensor, tensors: Tensors, scale: float) -> torch.Tensor:
        """Return |V| [T, out], with only a few rows of V in memory at a time."""
        return torch.stack(
            [
                torch.cat([_norms(torch.addmm(weight[rows].float(), b[rows].float(), a.float(), alpha=scale), weight.dtype)
                           for rows in _pieces(weight)])
                for a, b in zip(tensors[LORA_A], tensors[LORA_B], strict=True)
            ]
        )  # fmt: skip

    def forward(self, call: LayerPass, tensors: Tensors, scale: float) -> torch.Tensor:
        """Return the output as PEFT computes it: that of plain LoRA plus (m / |V| - 1) times that of V without the bias."""
        assert call.row_norms is not None, "W was read"
        if call.outputs_of_inputs is call.outputs:
            lora = alone = _with_product(call.outputs, call.inputs, tensors, scale)
        else:
            product = scale * torch.bmm(torch.bmm(call.inputs, tensors[LORA_A].mT), tensors[LORA_B].mT)
            lora, alone = call.outputs + product, call.outputs_of_inputs + product
        alone = alone if call.bias is None else alone - call.bias
        factor = tensors[LORA_MAGNITUDE].float() / call.row_norms.float() - 1.0
        return lora + factor.to(lora.dtype)[:, None] * alone

    def merger(self, tensors: Tensors, scale: float, dtype: torch.dtype) -> MergeRows:
        with_product, magnitude = super().merger(tensors, scale, dtype), tensors[LORA_MAGNITUDE].float()

        def merge_rows(rows: torch.Tensor, which: slice) -> torch.Tensor:
            directions = with_product(rows, which)
            return directions * (magnitude[which] / _norms(directions, dtype).float())[:, None]

        return merge_rows


def _with_product(outputs: torch.Tensor, inputs: torch.Tensor, tensors: Tensors, scale: float) -> torch.Tensor:
    return torch.baddbmm(outputs, torch.bmm(inputs, tensors[LORA_A].mT), tensors[LORA_B].mT, alpha=scale)


def _norms(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the norms of rows, bounded away from zero, so that a row of zeros stays zero."""
    return torch.linalg.vector_norm(rows, dim=1).clamp(min=torch.finfo(dtype).tiny).to(dtype)


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, PIECE_ELEMENTS // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


LIVE_KINDS: dict[AdapterName, LiveLora] = {"lora": LiveLora(), "rslora": LiveLora(), "dora": LiveDora()}
