"""Checkpoints that are quantized already, as the 16-bit tensors that transformers decodes them to when loading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.values import Encoding, TensorInfo
from orchestrator.errors import BaseError

KEYS = ("quantization_config", "compression_config")
FP8_BLOCK = (128, 128)
"""`weight_block_size` where the config does not give it, as transformers has it."""
FP8_SCALES, FP8_ACTIVATIONS = "_scale_inv", ".activation_scale"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
MXFP4_VALUES_PER_BYTE = 2
DECODED = "BF16"


def quantization_of(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the config key that says that the base is quantized, and the method; None if it is not.

    The key may be that of the text model in a multimodal config.
    """
    found = _settings(values)
    if found is None:
        return None
    key, known = found
    bits = next((f"bitsandbytes {n} bit" for n in (4, 8) if known.get(f"load_in_{n}bit")), "unknown")
    return key, str(known.get("quant_method", bits))


def refuse_undecodable(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise BaseError if the base is quantized by a method that is not decoded here."""
    found = quantization_of(values)
    if found is not None and found[1] not in DECODERS:
        raise BaseError(
            f"the base is quantized already ({found[0]}, method {found[1]!r})",
            where=str(folder / "config.json"),
            expected=f"16-bit or 32-bit weights, or the methods {', '.join(DECODERS)}, which are decoded when loading",
            remedy="give the original weights and let `base.quantize: nf4` or `int8` quantize them in memory",
        )


def decoded(
    folder: Path, values: Mapping[str, Any], stored: dict[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Return the stored tensors as they are after decoding, and a note if they are quantized.

    Raises:
        BaseError: scales that do not fit their tensor.
    """
    found = quantization_of(values)
    settings = _settings(values)
    if found is None or settings is None:
        return stored, ()
    method = found[1]
    tensors = DECODERS[method](folder, settings[1], stored)
    count = sum(tensor.encoding is not None for tensor in tensors.values())
    note = f"the base is stored in {method}: {count} tensors are decoded to bfloat16 on loading, and the bundle is in 16 bit"
    return tensors, (note,) if count else ()


def _settings(values: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the config key that says that the base is quantized, and its table; None if it is not."""
    inner = values.get("text_config")
    for level in (values, cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}):
        for key in KEYS:
            if level.get(key):
                return key, cast("dict[str, Any]", level[key]) if isinstance(level[key], dict) else {}
    return None


def _from_fp8(folder: Path, settings: Mapping[str, Any], stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Weights in 8-bit floats with a scale for each of their blocks, `weight_scale_inv` (DeepSeek V3).

    transformers takes size / number of scales for the size of a block. That is another block than the one the checkpoint was
    quantized with where the last block of several is not full.
    """
    block = settings.get("weight_block_size", FP8_BLOCK)
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        scales = stored.get(f"{name}{FP8_SCALES}")
        if scales is not None:
            if not _is_decoded_right(info.shape, scales.shape, block):
                raise BaseError(
                    f"{name} has shape {list(info.shape)} and {list(scales.shape)} scales, with `weight_block_size` {block}",
                    where=str(folder / info.file),
                    expected="whole blocks, or a single one: transformers (5.23) decodes no others",
                    remedy="use the base in 16 bit",
                )
            encoding = Encoding(kind="fp8", data=name, scales=scales.name, scales_file=scales.file)
            tensors[name] = info.model_copy(update={"dtype": DECODED, "encoding": encoding})
        elif not name.endswith((FP8_SCALES, FP8_ACTIVATIONS)):
            tensors[name] = info
    return tensors


def _is_decoded_right(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> bool:
    """Return whether the blocks that transformers computes from the shapes are those of the config; None: one scale for all."""
    if math.prod(scales) == 1 and len(scales) < len(shape):
        return True
    if len(shape) < 2 or len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return False
    if block is None:
        return scales[-2:] == (1, 1)
    if not isinstance(block, list | tuple) or len(cast("list[Any]", block)) != 2:
        return False
    sizes = zip(shape[-2:], scales[-2:], cast("list[Any]", block), strict=True)
    return all(size == number * width or (number == 1 and size < width) for size, number, width in sizes)


def _from_mxfp4(folder: Path, settings: Mapping[str, Any], stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Routed experts in 4-bit floats, `_blocks` [experts, out, groups, 16] with a scale for each group in `_scales`, which
    are the weights [experts, in, out] of the class (gpt-oss)."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        scales = stored.get(f"{name.removesuffix(MXFP4_BLOCKS)}{MXFP4_SCALES}")
        if name.endswith(MXFP4_BLOCKS) and scales is not None:
            *leading, out, groups, size = info.shape
            decoded_name = name.removesuffix(MXFP4_BLOCKS)
            tensors[decoded_name] = TensorInfo(
                name=decoded_name,
                shape=(*leading, groups * size * MXFP4_VALUES_PER_BYTE, out),
                dtype=DECODED,
                file=info.file,
                encoding=Encoding(kind="mxfp4", data=name, scales=scales.name, scales_file=scales.file),
            )
        elif not (name.endswith(MXFP4_SCALES) and f"{name.removesuffix(MXFP4_SCALES)}{MXFP4_BLOCKS}" in stored):
            tensors[name] = info
    return tensors


DECODERS = {"fp8": _from_fp8, "mxfp4": _from_mxfp4}
"""Method -> the tensors that it decodes to."""
