"""Law 2 on a live model: what is frozen is bit for bit what was loaded, and so is the base between two trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from orchestrator.train.fingerprint import changed, fingerprint, tensors_of


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of every tensor that this rank holds of the base, by name."""
    return fingerprint(_local_tensors(model, frozenset()))


def changed_frozen(model: nn.Module, reference: Mapping[str, str]) -> list[str]:
    """Names of frozen tensors that differ from `reference` while some parameters of the model learn."""
    learning = frozenset(name for name, parameter in _parameters(model) if parameter.requires_grad)
    now = fingerprint(_local_tensors(model, learning))
    return changed({name: reference[name] for name in now if name in reference}, {n: h for n, h in now.items() if n in reference})


def changed_base(model: nn.Module, reference: Mapping[str, str], names: frozenset[str]) -> list[str]:
    """Names among `names` (and their quantization's tensors) that a closed branch did not put back as they were."""
    others = frozenset(name for name, _ in _parameters(model)) - names
    now = fingerprint(_local_tensors(model, others))
    return changed({name: reference.get(name, "") for name in now}, now)


def _parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        yield name.replace(".base_layer.", "."), parameter


def _local_tensors(model: nn.Module, except_for: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """As `tensors_of`, with this rank's part where ZeRO-3 has partitioned a parameter."""
    parts = {name: parameter.ds_tensor.data for name, parameter in _parameters(model) if hasattr(parameter, "ds_tensor")}
    for name, tensor in tensors_of(model, except_for):
        yield name, parts.get(name, tensor)
