"""Adapters on a live model: those of one trial, or of several that are trained in one batch.

Shapes: T trials, N tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from orchestrator.spec.adapters import ADAPTER_KINDS, AdapterName
from orchestrator.train.adapters.experts import AdaptedExperts
from orchestrator.train.adapters.kinds import LIVE_KINDS, LayerPass
from orchestrator.train.adapters.naming import AdapterSpec, live_name
from orchestrator.train.model.base import LoadedBase, dequantized, generator_for

MakeWhole = Callable[[Iterable[nn.Parameter]], AbstractContextManager[None]]


def _as_they_are(_: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()


class AdaptedLinear(nn.Module):
    """A frozen linear layer with the adapters of T trials.

    The rows of the input are T equal parts, one per trial. The layer itself runs once for all of them, and the adapters of
    neighbours of one kind and rank are stacked. Ranks are not filled up to each other with zeros: measured on a CPU in
    float32, that changes the last bits, and how many trials are stacked does not. The parameters are this module's own, for
    ZeRO-3 gathers those of the module that is called.
    """

    def __init__(
        self, base_layer: nn.Module, name: str, specs: Sequence[AdapterSpec], base: LoadedBase, whole: MakeWhole = _as_they_are
    ) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.num_trials = len(specs)
        kinds = [_stacked_kind(spec) if f"{name}.weight" in spec.selection.adapted else None for spec in specs]
        self._stacks = _neighbours(kinds)
        self._row_norms: list[torch.Tensor | None] = [None] * len(self._stacks)
        reads_weight = any(kind is not None and LIVE_KINDS[kind.name].reads_weight for kind in kinds)
        with whole(base_layer.parameters()) if reads_weight else nullcontext():
            for trial, (spec, kind) in enumerate(zip(specs, kinds, strict=True)):
                if kind is not None:
                    self._add(trial, kind, base, lambda suffix, seed=spec.seed: generator_for(seed, f"{name}{suffix}"))
        if reads_weight:
            # An engine that partitions W gathers it only while the layer runs: this hook must run before the engine's own.
            base_layer.register_forward_hook(self._read_weight)

    def _add(self, trial: int, kind: StackedKind, base: LoadedBase, generator: Callable[[str], torch.Generator]) -> None:
        layer = self.base_layer
        shape = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
        values = LIVE_KINDS[kind.name].initial(shape, kind.lora_rank, generator, lambda: _matrix_of(layer))
        for suffix, value in values.items():
            parameter = nn.Parameter(value.to(device=base.device, dtype=base.dtype))
            self.register_parameter(live_name(suffix, trial), parameter)

    @property
    def weight(self) -> Any:
        """The frozen weight of the wrapped layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [T * rows, tokens, in] -> [T * rows, tokens, out]."""
        self._row_norms[:] = [None] * len(self._stacks)  # valid for this call only: the adapters change before the next one
        out = self.base_layer(x)
        inputs, outputs = (states.reshape(self.num_trials, -1, states.shape[-1]) for states in (x, out))
        parts = [
            self._adapted(stack, inputs[stack.trials], outputs[stack.trials], row_norms)
            for stack, row_norms in zip(self._stacks, list(self._row_norms), strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(out.shape)

    def _adapted(self, stack: Stack, inputs: torch.Tensor, outputs: torch.Tensor, row_norms: torch.Tensor | None) -> torch.Tensor:
        """Return the base's `outputs` [t, N, out] with the adapters of these t trials applied."""
        if stack.kind is None:
            return outputs
        name, outputs_of_inputs = stack.kind.name, outputs
        if stack.kind.dropout and self.training:
            inputs = functional.dropout(inputs, stack.kind.dropout)
            if ADAPTER_KINDS[name].runs_layer_on_its_input:
                outputs_of_inputs = self.base_layer(inputs)
        call = LayerPass(inputs, outputs, outputs_of_inputs, self.base_layer.bias, row_norms)
        return LIVE_KINDS[name].forward(call, self._tensors(stack), stack.kind.scale)

    def _tensors(self, stack: Stack) -> dict[str, torch.Tensor]:
        """Return the stacked tensors of a stack's adapters by suffix."""
        assert stack.kind is not None
        trials = range(stack.trials.start, stack.trials.stop)
        return {
            suffix: torch.stack([getattr(self, live_name(suffix, trial)) for trial in trials])
            for suffix in ADAPTER_KINDS[stack.kind.name].suffixes
        }

    @torch.no_grad()
    def _read_weight(self, layer: Any, *_: object) -> None:
        """Compute what the kinds that read the weight need, while it is unpartitioned."""
        for number, stack in enumerate(self._stacks):
            if stack.kind is not None and LIVE_KINDS[stack.kind.name].reads_weight and self._row_norms[number] is None:
                weight = _matrix_of(layer)
                self._row_norms[number] = LIVE_KINDS[stack.kind.name].row_norms(weight, self._tensors(stack), stack.kind.scale)


def _matrix_of(layer: Any) -> torch.Tensor:
    """Return the weight [out, in] that a layer multiplies with."""
    weight = dequantized(layer.weight)
    return weight.mT if isinstance(layer, Conv1D) else weight


class StackedKind(NamedTuple):
    """Properties that stacked adapters have in common."""

    name: AdapterName
    lora_rank: int
    scale: float
    dropout: float


class Stack(NamedTuple):
    """Consecutive trials whose adapters are stacked; without a kind, trials that do not adapt this weight."""

    trials: slice
    kind: StackedKind | None


def _stacked_kind(spec: AdapterSpec) -> StackedKind:
    adapter = spec.selection.adapter
    return StackedKind(adapter.kind, spec.selection.lora_rank or 0, spec.scale, adapter.dropout)


def _neighbours(kinds: Sequence[StackedKind | None]) -> list[Stack]:
    """Return the runs of consecutive trials of equal kinds."""
    borders = [index for index in range(len(kinds)) if index == 0 or kinds[index] != kinds[index - 1]]
    return [Stack(slice(first, last), kinds[first]) for first, last in pairwise([*borders, len(kinds)])]


ADAPTED_MODULES = (AdaptedLinear, AdaptedExperts)


def adapt(base: LoadedBase, specs: Sequence[AdapterSpec], undo: ExitStack, whole: MakeWhole = _as_they_are) -> None:
    """Attach adapters to every weight that one of the trials adapts; `undo` removes them again, except their hooks.

    Args:
        whole: Returns a context in which parameters of the base are unpartitioned; see `WeightKeeper.whole`.
    """
    modules: dict[str, list[str]] = {}
    for weight in dict.fromkeys(weight for spec in specs for weight in spec.selection.adapted):
        modules.setdefault(weight.rpartition(".")[0], []).append(weight)
    for name, weights in modules.items():
        parent, attribute = base.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        layer = getattr(parent, attribute)
        if base.anatomy.routed.isdisjoint(weights):
            adapted = AdaptedLinear(layer, name, specs, base, whole)
        else:
            adapted = AdaptedExperts(layer, weights, specs[0], base)
        adapted.train(layer.training)
        undo.callback(setattr, parent, attribute, layer)
        setattr(parent, attribute, adapted)
