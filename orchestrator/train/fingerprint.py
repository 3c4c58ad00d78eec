"""Exact hashes of tensors: the proof that what is frozen did not change (law 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

CHUNK_BYTES = 64 * 1024**2
"""How much of a tensor is copied to the CPU at once."""


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """A BLAKE2b hash of each tensor's dtype, shape and bytes, by name. About 1 GB/s on one core."""
    return {name: tensor_hash(tensor) for name, tensor in tensors}


def tensor_hash(tensor: torch.Tensor) -> str:
    """BLAKE2b-128 of dtype, shape and bytes, in hexadecimal; the same on every device."""
    digest = hashlib.blake2b(f"{tensor.dtype}:{tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        for chunk in flat.view(torch.uint8).split(CHUNK_BYTES):
            digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names whose hash differs, or that stand on one side only; sorted."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def tensors_of(model: nn.Module, except_for: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, and of 4-bit weights also the scales that give them their meaning.

    Args:
        model: Any module. Names inside a LoRA layer are those of the layer that it wraps.
        except_for: Names to leave out (what learns).
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
    """absmax, code and offset of a bitsandbytes QuantState and of the nested one of double quantization."""
    for key in ("absmax", "code", "offset"):
        value = getattr(state, key, None)
        if isinstance(value, torch.Tensor):
            yield key, value
    nested = getattr(state, "state2", None)
    if nested is not None:
        yield from ((f"nested.{key}", value) for key, value in _quantization_tensors(nested))
