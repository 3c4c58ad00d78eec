"""Size of one quantized matrix, to the byte, as `train.model.base` loads it with bitsandbytes 0.50.2.

Measured, and compared in tests/unit/plan/memory/test_quantized.py with the storages of real quantized modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from orchestrator.spec.models import Quantize

NF4_BLOCK = 64
"""Weights per scale (`absmax`) in nf4: `Params4bit.blocksize`, which transformers leaves at its default."""
NF4_NESTED_BLOCK = 256
"""Scales per second-level scale under double quantization: how `quantize_4bit` calls `quantize_blockwise`."""
NF4_CODE_BYTES = 4 * 16
"""float32 values of the 16 codes: `get_4bit_type` creates a new table for every matrix."""
NESTED_CODE_BYTES = 4 * 256
"""float32 values of the 256 codes of a scale: `quantize_blockwise` copies the table for every matrix (`copy=True`)."""


@dataclass(frozen=True)
class QuantizedBytes:
    """Bytes of one matrix, by tensor. Nothing is shared between matrices."""

    packed: int
    """The parameter itself, the only part that ZeRO-3 partitions: the rest is plain attributes, whole on every rank."""
    absmax: int = 0
    """nf4: a byte per block of 64 weights (`quant_state.absmax`). int8: a float32 per row (`SCB`)."""
    nested_absmax: int = 0
    """nf4: a float32 per 256 scales (`quant_state.state2.absmax`)."""
    offset: int = 0
    """nf4: the mean of the scales, a float32 (`quant_state.offset`)."""
    code: int = 0
    """nf4: table of the 16 weight codes (`quant_state.code`)."""
    nested_code: int = 0
    """nf4: table of the 256 scale codes (`quant_state.state2.code`)."""

    @property
    def statistics(self) -> int:
        """Bytes of everything but the packed weights."""
        return self.absmax + self.nested_absmax + self.offset + self.code + self.nested_code

    @property
    def total(self) -> int:
        return self.packed + self.statistics


def quantized_bytes(shape: Sequence[int], quantize: Quantize, element_bytes: int) -> QuantizedBytes:
    """Return the bytes of one matrix.

    With n elements:

    - none: n·e, the compute dtype.
    - nf4: two weights a byte, ⌈n/2⌉ (`quantize_4bit`). The storage dtype is the compute dtype, so the bytes are seen as
      numbers of e bytes; that changes the shape of the parameter and not its size. On a CPU bitsandbytes rejects a matrix
      whose bytes are not a whole number of them, which cannot happen with even dimensions. A scale per 64 weights, ⌈n/64⌉
      bytes; a float32 per 256 of those; two tables and an offset, 1092 bytes (Dettmers et al. 2023, QLoRA, section 3).
    - int8: n bytes and a float32 per row (`Int8Params._quantize`; `CB` is the parameter's own storage). Whatever the
      compute dtype (Dettmers et al. 2022, LLM.int8(), section 2.1).

    Args:
        shape: (rows, columns): out and in features.
        quantize: How the base is loaded.
        element_bytes: Bytes of a number in the compute dtype.
    """
    elements = prod(shape)
    match quantize:
        case "none":
            return QuantizedBytes(packed=elements * element_bytes)
        case "int8":
            return QuantizedBytes(packed=elements, absmax=4 * shape[0])
        case "nf4":
            scales = -(-elements // NF4_BLOCK)
            return QuantizedBytes(
                packed=-(-elements // 2),
                absmax=scales,
                nested_absmax=4 * -(-scales // NF4_NESTED_BLOCK),
                offset=4,
                code=NF4_CODE_BYTES,
                nested_code=NESTED_CODE_BYTES,
            )


def dequantize_scratch_bytes(shape: Sequence[int], quantize: Quantize, element_bytes: int) -> int:
    """Return the temporary memory of one matrix during its multiplication, forward or backward, besides inputs and outputs.

    Only one matrix at a time: both passes free it before they return. With n elements of e bytes:

    - nf4: the matrix in the compute dtype, n·e, and its scales in float32, twice at the most, 8·⌈n/64⌉. Forward
      (bitsandbytes backends/cuda/ops.py, `_dequant_linear_fallback`, used above a few dozen to 1536 tokens,
      depending on GPU and shape; below that a fused kernel needs no temporary memory): `absmax_dq` and its sum with the
      offset both live until it returns. Backward (`MatMul4Bit.backward`, `dequantize_4bit`): the offset is added in place,
      4·⌈n/64⌉.
      The `.to(grad_output.dtype)` there copies nothing, since both are the compute dtype.
    - int8: forward, the product uses the int8 matrix directly (`MatMul8bitLt`). Backward, a copy in the compute dtype,
      n·e, is scaled in place by row scales in float32, 4 per row.

    On a CPU nf4's forward holds the scales once while the matrix exists; int8's in-place scaling goes through float32
    copies, and its forward dequantizes the matrix too (`MatMul8bitFp`). int8's temporary tensors per token on a GPU are not
    included: with k columns and r rows, k·(2 + 1) bytes for the input in float16 and int8, and r·(4 + 2 + e) for the product
    in int32, float16 and the compute dtype.

    Args:
        shape: (rows, columns): out and in features.
        quantize: How the base is loaded.
        element_bytes: Bytes of a number in the compute dtype.
    """
    elements = prod(shape)
    match quantize:
        case "none":
            return 0
        case "int8":
            return elements * element_bytes + 4 * shape[0]
        case "nf4":
            return elements * element_bytes + 8 * -(-elements // NF4_BLOCK)
