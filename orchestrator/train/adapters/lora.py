"""LoRA on a live model: adapters of one trial, or of several that are trained in one batch, beside each adapted weight.

Shapes: T trials, N tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from orchestrator.anatomy.values import LayerSelection
from orchestrator.train.model.base import LoadedBase, generator_for
from orchestrator.work.artifact import SUFFIX_A, SUFFIX_B

BASE_LAYER = "base_layer"
"""Where a LoraLinear keeps the layer that it stands for; names of frozen parameters leave it out."""


@dataclass(frozen=True)
class AdapterSpec:
    """What one trial wants beside the base's weights."""

    selection: LayerSelection
    lora_alpha: int
    seed: int


class LoraLinear(nn.Module):
    """A frozen linear layer, and beside it the low-rank products of T trials (Hu et al. 2021).

    The rows of the input are T equal parts, one a trial. The layer itself runs once for all of them, and the products of
    neighbours of one lora_rank are stacked. Ranks are not filled up to each other with zeros: measured on a CPU in
    float32, that changes the last bits, and how many trials are stacked does not. The parameters are this module's own, for
    ZeRO-3 gathers those of the module that is called.
    """

    def __init__(self, base_layer: nn.Module, name: str, specs: Sequence[AdapterSpec], base: LoadedBase) -> None:
        super().__init__()
        self.base_layer = base_layer
        ranks = [spec.selection.lora_rank or 0 if f"{name}.weight" in spec.selection.adapted else 0 for spec in specs]
        scales = [spec.lora_alpha / rank if rank else 0.0 for spec, rank in zip(specs, ranks, strict=True)]
        self.num_trials = len(specs)
        self._stacks = _neighbours(list(zip(ranks, scales, strict=True)))
        size: Any = base_layer
        for trial, (spec, rank) in enumerate(zip(specs, ranks, strict=True)):
            if not rank:
                continue
            a = _initial_a(name, rank, size.in_features, spec.seed).to(device=base.device, dtype=base.dtype)
            b = torch.zeros(size.out_features, rank, device=base.device, dtype=base.dtype)
            self.register_parameter(live_a(trial), nn.Parameter(a))
            self.register_parameter(live_b(trial), nn.Parameter(b))

    @property
    def weight(self) -> Any:
        """The frozen one."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T * rows, tokens, in] -> [T * rows, tokens, out]"""
        out = self.base_layer(x)
        inputs, outputs = (states.reshape(self.num_trials, -1, states.shape[-1]) for states in (x, out))
        parts = [self._product(stack, inputs[stack.trials], outputs[stack.trials]) for stack in self._stacks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(out.shape)

    def _product(self, stack: Stack, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """`outputs` [t, N, out] of the base and, of these t trials, what their adapters add to it."""
        if not stack.lora_rank:
            return outputs
        trials = range(stack.trials.start, stack.trials.stop)
        a = torch.stack([getattr(self, live_a(trial)) for trial in trials])
        b = torch.stack([getattr(self, live_b(trial)) for trial in trials])
        return torch.baddbmm(outputs, torch.bmm(inputs, a.mT), b.mT, alpha=stack.scale)


class Stack(NamedTuple):
    """Neighbours whose products have one shape."""

    trials: slice
    lora_rank: int
    scale: float


def _neighbours(kinds: Sequence[tuple[int, float]]) -> list[Stack]:
    """Runs of equal (lora_rank, scale)."""
    borders = [index for index in range(len(kinds)) if index == 0 or kinds[index] != kinds[index - 1]]
    return [Stack(slice(first, last), *kinds[first]) for first, last in pairwise([*borders, len(kinds)])]


def adapt(base: LoadedBase, specs: Sequence[AdapterSpec], undo: ExitStack) -> None:
    """Put adapters beside every weight that one of the trials adapts; `undo` takes them out again."""
    names = dict.fromkeys(name.rpartition(".")[0] for spec in specs for name in spec.selection.adapted)
    for name in names:
        parent, attribute = base.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        layer = getattr(parent, attribute)
        adapted = LoraLinear(layer, name, specs, base)
        adapted.train(layer.training)
        undo.callback(setattr, parent, attribute, layer)
        setattr(parent, attribute, adapted)


def live_a(trial: int) -> str:
    return f"lora_A_{trial}"


def live_b(trial: int) -> str:
    return f"lora_B_{trial}"


def stable_name(name: str, trial: int = 0) -> str:
    """A parameter's name without what adapting put in: `q_proj.lora_A_0` -> `q_proj.lora_A.weight`, as PEFT saves it."""
    name = name.replace(f".{BASE_LAYER}.", ".")
    for live, suffix in ((live_a(trial), SUFFIX_A), (live_b(trial), SUFFIX_B)):
        name = name.removesuffix(f".{live}") + suffix if name.endswith(f".{live}") else name
    return name


def _initial_a(name: str, rank: int, width: int, seed: int) -> torch.Tensor:
    """uniform(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5, as Hu et al. 2021 and PEFT do); B begins at zero."""
    bound = width**-0.5
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator_for(seed, f"{name}{SUFFIX_A}"))
