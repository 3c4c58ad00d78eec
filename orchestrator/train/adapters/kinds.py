"""The arithmetic of each adapter kind: its first values, its forward pass, its merge. `spec.adapters` holds the facts.

Shapes: T trials, N tokens of each, a frozen weight W [out, in], r the rank. Tensors go by the suffixes of `AdapterKind.shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from orchestrator.spec.adapters import LORA_A, LORA_B, AdapterName, Shape

Tensors = Mapping[str, torch.Tensor]
MergeRows = Callable[[torch.Tensor, slice], torch.Tensor]
"""From rows of W in float32, and which rows they are, the same rows with the adapter, in float32."""


class LiveLora:
    """W + scale * B @ A (Hu et al. 2021)."""

    def initial(self, weight: Shape, rank: int, generator: Callable[[str], torch.Generator]) -> dict[str, torch.Tensor]:
        """Return float32 values on the CPU that leave the layer's output as it is.

        A is uniform(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5, as Hu et al. 2021 and PEFT do); B is zero.

        Args:
            generator: Gives the generator of a tensor, by its suffix.
        """
        bound = weight[1] ** -0.5
        a = torch.empty(rank, weight[1]).uniform_(-bound, bound, generator=generator(LORA_A))
        return {LORA_A: a, LORA_B: torch.zeros(weight[0], rank)}

    def forward(self, inputs: torch.Tensor, outputs: torch.Tensor, tensors: Tensors, scale: float) -> torch.Tensor:
        """Return what T layers give with their adapters [T, N, out].

        Args:
            inputs: [T, N, in]
            outputs: Those of the frozen layer [T, N, out].
            tensors: Of all trials, stacked along a first dimension T.
        """
        return torch.baddbmm(outputs, torch.bmm(inputs, tensors[LORA_A].mT), tensors[LORA_B].mT, alpha=scale)

    def merger(self, tensors: Tensors, scale: float) -> MergeRows:
        """Return the function that merges one weight row by row.

        Args:
            tensors: As they are stored, B mapped from its file.
        """
        a, b = tensors[LORA_A].float(), tensors[LORA_B]
        return lambda rows, which: torch.addmm(rows, b[which].float(), a, alpha=scale)


LIVE_KINDS: dict[AdapterName, LiveLora] = {"lora": LiveLora()}
