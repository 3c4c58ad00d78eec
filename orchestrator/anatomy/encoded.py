"""Checkpoints that are quantized already, as the 16-bit tensors that transformers decodes them to when loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.values import Encoding, TensorInfo
from orchestrator.errors import BaseError

KEYS = ("quantization_config", "compression_config")
FP8_SCALES, FP8_ACTIVATIONS = "_scale_inv", ".activation_scale"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
MXFP4_VALUES_PER_BYTE = 2
DECODED = "BF16"


def quantization_of(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the config key that says that the base is quantized, and the method; None if it is not.

    The key may be that of the text model in a multimodal config.
    """
    inner = values.get("text_config")
    for level in (values, cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}):
        for key in KEYS:
            if level.get(key):
                known = cast("dict[str, Any]", level[key]) if isinstance(level[key], dict) else {}
                bits = next((f"bitsandbytes {n} bit" for n in (4, 8) if known.get(f"load_in_{n}bit")), "unknown")
                return key, str(known.get("quant_method", bits))
    return None


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
    if found is None:
        return stored, ()
    tensors = DECODERS[found[1]](folder, stored)
    count = sum(tensor.encoding is not None for tensor in tensors.values())
    note = f"the base is stored in {found[1]}: {count} tensors are decoded to bfloat16 on loading, and the bundle is in 16 bit"
    return tensors, (note,) if count else ()


def _from_fp8(folder: Path, stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Weights in 8-bit floats with a scale for each of their blocks, `weight_scale_inv` (DeepSeek V3)."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        scales = stored.get(f"{name}{FP8_SCALES}")
        if scales is not None:
            uneven = len(scales.shape) > 1 and any(
                size % parts for size, parts in zip(info.shape[-2:], scales.shape[-2:], strict=True)
            )
            if uneven:
                raise BaseError(
                    f"{name} has shape {list(info.shape)} and {list(scales.shape)} scales",
                    where=str(folder / info.file),
                    expected="blocks that divide the tensor: transformers (5.23) decodes no others",
                    remedy="use the base in 16 bit",
                )
            encoding = Encoding(kind="fp8", data=name, scales=scales.name, scales_file=scales.file)
            tensors[name] = info.model_copy(update={"dtype": DECODED, "encoding": encoding})
        elif not name.endswith((FP8_SCALES, FP8_ACTIVATIONS)):
            tensors[name] = info
    return tensors


def _from_mxfp4(folder: Path, stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
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
