"""Law 2 on a live model: what is frozen is bit for bit what was loaded, and so is the base between two trials."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from orchestrator.errors import TrainingError
from orchestrator.train.ranks import Ranks


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of every tensor that this rank holds of the base, by name."""
    return fingerprint(_local_tensors(model, frozenset()))


def changed_frozen(model: nn.Module, reference: Mapping[str, str]) -> list[str]:
    """Return the names of frozen tensors that differ from `reference` while some parameters of the model are trained."""
    learning = frozenset(name for name, parameter in _parameters(model) if parameter.requires_grad)
    now = fingerprint(_local_tensors(model, learning))
    return changed({name: reference[name] for name in now if name in reference}, {n: h for n, h in now.items() if n in reference})


def prove_frozen(model: nn.Module, reference: Mapping[str, str], ranks: Ranks) -> None:
    """Prove law 2: every frozen tensor is bit for bit as it was loaded. Called on every rank.

    Raises:
        TrainingError: a frozen tensor changed, on any rank.
    """
    moved = changed_frozen(model, reference)
    (count,) = ranks.sum([len(moved)])
    if count:
        where = moved[0] if moved else "on another rank"
        raise TrainingError(f"{count:.0f} frozen tensors changed during training", where=where)


def changed_base(model: nn.Module, reference: Mapping[str, str], names: frozenset[str]) -> list[str]:
    """Names among `names` (and their quantization's tensors) that a closed branch did not put back as they were."""
    others = frozenset(name for name, _ in _parameters(model)) - names
    now = fingerprint(_local_tensors(model, others))
    return changed({name: reference.get(name, "") for name in now}, now)


def _parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        # A LoRA layer wraps the base's layer, and renames its weight.
        yield name.replace(".base_layer.", "."), parameter


def _local_tensors(model: nn.Module, except_for: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensors of `tensors_of`, with this rank's part of parameters that ZeRO-3 has partitioned."""
    parts = {name: parameter.ds_tensor.data for name, parameter in _parameters(model) if hasattr(parameter, "ds_tensor")}
    for name, tensor in tensors_of(model, except_for):
        yield name, parts.get(name, tensor)


CHUNK_BYTES = 64 * 1024**2
"""Bytes of a tensor that are copied to the CPU at once."""


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return a BLAKE2b hash of each tensor's dtype, shape and bytes, by name. About 1 GB/s on one core."""
    return {name: tensor_hash(tensor) for name, tensor in tensors}


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return BLAKE2b-128 of dtype, shape and bytes in hexadecimal, the same on every device."""
    digest = hashlib.blake2b(f"{tensor.dtype}:{tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        # In chunks, so that a GPU's tensors need no second copy in host memory. As bytes, since numpy has no bfloat16.
        for chunk in flat.view(torch.uint8).split(CHUNK_BYTES):
            digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the names whose hash differs or that exist on one side only, sorted."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def tensors_of(model: nn.Module, except_for: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, and of 4-bit weights also the scales that give them their meaning.

    Args:
        model: Any module. Names inside a LoRA layer are those of the layer that it wraps.
        except_for: Names to leave out (the trainable weights).
    """
    for full_name, parameter in model.named_parameters():
        name = full_name.replace(".base_layer.", ".")
        if name in except_for:
            continue
        yield name, parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from ((f"{name}.{key}", value) for key, value in _quantization_tensors(state))
    for full_name, buffer in model.named_buffers():
        yield full_name.replace(".base_layer.", "."), buffer


def _quantization_tensors(state: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield absmax, code and offset of a bitsandbytes QuantState and of the nested one of double quantization."""
    for key in ("absmax", "code", "offset"):
        value = getattr(state, key, None)
        if isinstance(value, torch.Tensor):
            yield key, value
    nested = getattr(state, "state2", None)
    if nested is not None:
        yield from ((f"nested.{key}", value) for key, value in _quantization_tensors(nested))
