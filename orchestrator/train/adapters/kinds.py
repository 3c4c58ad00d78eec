"""The arithmetic of each adapter kind: its first values, its forward pass, its merge. `spec.adapters` holds the facts.

Shapes: T trials, N tokens of each, a frozen weight W [out, in], r the rank. Tensors go by the suffixes of `AdapterKind.shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from orchestrator.spec.adapters import LORA_A, LORA_B, AdapterName, Shape

Tensors = Mapping[str, torch.Tensor]
MergeRows = Callable[[torch.Tensor, slice], torch.Tensor]
"""From rows of W in float32, and which rows they are, the same rows with the adapter, in float32."""


@dataclass(frozen=True)
class LayerPass:
    """One call of a frozen layer, and what the adapters of T trials need of it."""

    inputs: torch.Tensor
    """What adapters read [T, N, in]: the layer's own input, or that after dropout."""
    outputs: torch.Tensor
    """Of the layer on its own input [T, N, out]."""
    outputs_of_inputs: torch.Tensor
    """Of the layer on `inputs` [T, N, out]: `outputs` itself unless the kind reads the weight and inputs were dropped out."""
    bias: torch.Tensor | None
    row_norms: torch.Tensor | None
    """What `LiveLora.row_norms` gave [T, out]; None where the kind does not read the weight."""


class LiveLora:
    """W + scale * B @ A (Hu et al. 2021), and the base class of the other kinds."""

    reads_weight = False
    """Whether the forward pass needs W itself, not only what the frozen layer gives."""

    def initial(
        self, shape: Shape, rank: int, generator: Callable[[str], torch.Generator], weight: Callable[[], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return values that leave the layer's output as it is.

        A is uniform(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5, as Hu et al. 2021 and PEFT do); B is zero.

        Args:
            shape: Of W.
            generator: Gives the generator of a tensor, by its suffix.
            weight: Gives W in the compute dtype; called only where the kind reads the weight.
        """
        bound = shape[1] ** -0.5
        a = torch.empty(rank, shape[1]).uniform_(-bound, bound, generator=generator(LORA_A))
        return {LORA_A: a, LORA_B: torch.zeros(shape[0], rank)}

    def row_norms(self, weight: torch.Tensor, tensors: Tensors, scale: float) -> torch.Tensor:
        """Return what the forward pass needs of W [T, out]; called while W is whole, where the kind reads it."""
        raise NotImplementedError

    def forward(self, call: LayerPass, tensors: Tensors, scale: float) -> torch.Tensor:
        """Return what T layers give with their adapters [T, N, out].

        Args:
            tensors: Of all trials, stacked along a first dimension T.
        """
        return _with_product(call.outputs, call.inputs, tensors, scale)

    def merger(self, tensors: Tensors, scale: float, dtype: torch.dtype) -> MergeRows:
        """Return the function that merges one weight row by row.

        Args:
            tensors: As they are stored, B mapped from its file.
            dtype: What training computed in.
        """
        a, b = tensors[LORA_A].float(), tensors[LORA_B]
        return lambda rows, which: torch.addmm(rows, b[which].float(), a, alpha=scale)


def _with_product(outputs: torch.Tensor, inputs: torch.Tensor, tensors: Tensors, scale: float) -> torch.Tensor:
    return torch.baddbmm(outputs, torch.bmm(inputs, tensors[LORA_A].mT), tensors[LORA_B].mT, alpha=scale)


LIVE_KINDS: dict[AdapterName, LiveLora] = {"lora": LiveLora(), "rslora": LiveLora()}
