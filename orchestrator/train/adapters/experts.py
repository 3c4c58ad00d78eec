"""Adapters on routed experts, whose matrices are parameters of one module and not layers of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from orchestrator.spec.adapters import LORA_A, LORA_B
from orchestrator.train.adapters.kinds import LIVE_KINDS
from orchestrator.train.adapters.naming import AdapterSpec, live_name
from orchestrator.train.model.base import LoadedBase, generator_for
from orchestrator.train.model.experts import ADAPTERS, ExpertAdapter, factors, is_grouped


class AdaptedExperts(nn.Module):
    """A frozen module of routed experts with the adapters of one trial.

    While the module runs, it finds its adapters in an attribute, if transformers hands its products to the function in
    `train.model.experts`; a module that computes them itself finds adapted copies of its weights. The adapters are this module's
    own parameters, for ZeRO-3 gathers those of the module that is called.
    """

    def __init__(self, base_layer: nn.Module, names: Sequence[str], spec: AdapterSpec, base: LoadedBase) -> None:
        """
        Args:
            names: Full names of its adapted parameters.
        """
        super().__init__()
        self.base_layer: Any = base_layer
        self._scale = spec.scale
        self._grouped = is_grouped(base_layer)
        self._transposed = {name.rpartition(".")[2]: name in base.anatomy.transposed for name in names}
        self._attributes: dict[str, dict[str, str]] = {}
        kind, lora_rank = LIVE_KINDS[spec.selection.adapter.kind], spec.selection.lora_rank or 0
        for name in names:
            own = name.rpartition(".")[2]
            shape = base.anatomy.matrix_shape(name)
            values = kind.initial(
                shape,
                lora_rank,
                lambda suffix, name=name: generator_for(spec.seed, f"{name}{suffix}"),
                lambda name=name: base.model.get_parameter(name).detach(),
            )
            self._attributes[own] = {suffix: live_name(suffix, 0, own) for suffix in values}
            for suffix, value in values.items():
                parameter = nn.Parameter(value.to(device=base.device, dtype=base.dtype))
                self.register_parameter(self._attributes[own][suffix], parameter)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Compute what the frozen module computes of these inputs, with the adapters."""
        with self._applied():
            return self.base_layer(*args, **options)

    def _adapters(self) -> dict[str, ExpertAdapter]:
        return {
            own: ExpertAdapter(getattr(self, names[LORA_A]), getattr(self, names[LORA_B]), self._scale)
            for own, names in self._attributes.items()
        }

    @contextmanager
    def _applied(self) -> Iterator[None]:
        layer, adapters = self.base_layer, self._adapters()
        if self._grouped:
            setattr(layer, ADAPTERS, adapters)
            try:
                yield
            finally:
                delattr(layer, ADAPTERS)
            return

        # As entries of the module's dictionary the copies hide its parameters, which stay where they are. They are made by a hook
        # that comes last, once an engine that partitions parameters has gathered them.
        def hide(module: nn.Module, _: object) -> None:
            for own, adapter in adapters.items():
                weight = module.get_parameter(own)
                module.__dict__[own] = adapted_weight(weight, adapter, transposed=self._transposed[own])

        handle = layer.register_forward_pre_hook(hide)
        try:
            yield
        finally:
            handle.remove()
            for own in adapters:
                layer.__dict__.pop(own, None)


def adapted_weight(weight: torch.Tensor, adapter: ExpertAdapter, *, transposed: bool) -> torch.Tensor:
    """Return a copy of weight [E, out, in] (or [E, in, out] if `transposed`) with the adapter of each expert."""
    a, b = factors(adapter.a, adapter.b, weight.shape[0])
    left, right = (a.mT, b.mT) if transposed else (b, a)
    return torch.baddbmm(weight, left, right, alpha=adapter.scale)
