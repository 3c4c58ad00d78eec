"""LoRA on a live model: adapters of one trial, or of several that are trained in one batch, beside each adapted weight.

Shapes: T trials, N tokens of each, r the largest lora_rank among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from orchestrator.anatomy.values import LayerSelection
from orchestrator.plan.artifact import SUFFIX_A, SUFFIX_B
from orchestrator.train.base import LoadedBase, generator_for

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

    The rows of the input are T equal parts, one a trial. The layer itself runs once for all of them; the products are
    stacked, with zeros where a trial has a lower rank, or none here, so that no trial's numbers depend on another's.
    The parameters are this module's own, for ZeRO-3 gathers those of the module that is called.
    """

    def __init__(self, base_layer: nn.Module, name: str, specs: Sequence[AdapterSpec], base: LoadedBase) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._ranks = [spec.selection.lora_rank or 0 if f"{name}.weight" in spec.selection.adapted else 0 for spec in specs]
        self._scales = [spec.lora_alpha / rank if rank else 0.0 for spec, rank in zip(specs, self._ranks, strict=True)]
        size: Any = base_layer
        for trial, (spec, rank) in enumerate(zip(specs, self._ranks, strict=True)):
            if not rank:
                continue
            a = _initial_a(name, rank, size.in_features, spec.seed).to(device=base.device, dtype=base.dtype)
            b = torch.zeros(size.out_features, rank, device=base.device, dtype=base.dtype)
            self.register_parameter(live_a(trial), nn.Parameter(a))
            self.register_parameter(live_b(trial), nn.Parameter(b))
        self.weight_shape: tuple[int, int] = (size.out_features, size.in_features)

    @property
    def weight(self) -> Any:
        """The frozen one."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def num_trials(self) -> int:
        return len(self._ranks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T * rows, tokens, in] -> [T * rows, tokens, out]"""
        out = self.base_layer(x)
        a, b = self._stacked()
        inner = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.mT)
        if len(set(self._scales)) > 1:
            inner = inner * torch.tensor(self._scales, dtype=inner.dtype, device=inner.device)[:, None, None]
            return torch.baddbmm(out.view(len(b), -1, out.shape[-1]), inner, b.mT).view(out.shape)
        return torch.baddbmm(out.view(len(b), -1, out.shape[-1]), inner, b.mT, alpha=self._scales[0]).view(out.shape)

    def _stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A as [T, r, in] and B as [T, out, r]."""
        a = [getattr(self, live_a(trial)) if rank else None for trial, rank in enumerate(self._ranks)]
        b = [getattr(self, live_b(trial)) if rank else None for trial, rank in enumerate(self._ranks)]
        most = max(self._ranks)
        return torch.stack(_filled(a, (most, self.weight_shape[1]))), torch.stack(_filled(b, (self.weight_shape[0], most)))


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


def _filled(parts: Sequence[torch.Tensor | None], shape: tuple[int, int]) -> list[torch.Tensor]:
    """Each part with zeros up to `shape`; zeros alone where there is none."""
    like = next(part for part in parts if part is not None)
    return [
        like.new_zeros(shape)
        if part is None
        else functional.pad(part, (0, shape[1] - part.shape[1], 0, shape[0] - part.shape[0]))
        for part in parts
    ]


def _initial_a(name: str, rank: int, width: int, seed: int) -> torch.Tensor:
    """uniform(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5, as Hu et al. 2021 and PEFT do); B begins at zero."""
    bound = width**-0.5
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator_for(seed, f"{name}{SUFFIX_A}"))
