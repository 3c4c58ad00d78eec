"""What one quantized matrix takes, to the byte, as `train.model.base` loads it with bitsandbytes 0.50.2.

Measured and compared in tests/unit/plan/test_quantized.py with the storages of real quantized modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from orchestrator.spec.models import Quantize

NF4_BLOCK = 64
"""Weights that share a scale (`absmax`) in nf4: `Params4bit.blocksize`, which transformers leaves at its default."""
NF4_NESTED_BLOCK = 256
"""Scales that share a scale of their own under double quantization: `quantize_4bit` calls `quantize_blockwise` so."""
NF4_CODE_BYTES = 4 * 16
"""float32 values of the 16 codes: `get_4bit_type` makes a new table for every matrix."""
NESTED_CODE_BYTES = 4 * 256
"""float32 values of the 256 codes of a scale: `quantize_blockwise` copies the table for every matrix (`copy=True`)."""


@dataclass(frozen=True)
class QuantizedBytes:
    """Bytes that one matrix owns, by tensor. Nothing is shared between matrices."""

    packed: int
    """The parameter itself. All that ZeRO-3 partitions: the rest is plain attributes, whole on every rank."""
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
        """Everything but the packed weights."""
        return self.absmax + self.nested_absmax + self.offset + self.code + self.nested_code

    @property
    def total(self) -> int:
        return self.packed + self.statistics


def quantized_bytes(shape: Sequence[int], quantize: Quantize, element_bytes: int) -> QuantizedBytes:
    """Bytes of one matrix.

    With n elements:

    - none: n·e, the compute dtype.
    - nf4: two weights a byte, ⌈n/2⌉ (`quantize_4bit`). The storage dtype is the compute dtype, so the bytes are seen as
      numbers of e bytes; that changes the shape of the parameter and not its size. bitsandbytes refuses on a CPU what
      is no whole number of them, which no matrix with even dimensions is. A scale per 64 weights, ⌈n/64⌉ bytes; a
      float32 per 256 of those; two tables and an offset, 1092 bytes (Dettmers et al. 2023, QLoRA, section 3).
    - int8: n bytes and a float32 per row (`Int8Params._quantize`; `CB` is the parameter's own storage). Whatever the
      compute dtype (Dettmers et al. 2022, LLM.int8(), section 2.1).

    Args:
        shape: (rows, columns): out and in features.
        quantize: How the base is loaded.
        element_bytes: Of a number in the compute dtype.
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
    """What one matrix takes for the moment in which it multiplies, forward or backward, beside inputs and outputs.

    One matrix at a time: the forward and the backward pass each let it go before they return. With n elements of e
    bytes:

    - nf4: the matrix in the compute dtype, n·e, and its scales in float32, twice at the most, 8·⌈n/64⌉. Forward
      (bitsandbytes backends/cuda/ops.py, `_dequant_linear_fallback`, which more than a few dozen to 1536 tokens take,
      by GPU and shape; below that a fused kernel needs none of it): `absmax_dq` and its sum with the offset both live
      until it returns. Backward (`MatMul4Bit.backward`, `dequantize_4bit`): the offset is added in place, 4·⌈n/64⌉.
      The `.to(grad_output.dtype)` there copies nothing, for both are the compute dtype.
    - int8: forward, the product is made of int8 numbers and the matrix stays as it is (`MatMul8bitLt`). Backward, a copy
      in the compute dtype is scaled in place, n·e, by row scales in float32, 4 a row.

    On a CPU nf4's forward has the scales once while the matrix is there; int8's scaling in place goes through float32
    copies, and its forward opens the matrix too (`MatMul8bitFp`). What int8 makes of a batch of tokens on a GPU is not
    in here: with k columns, r rows, per token k·(2 + 1) bytes for the input in float16 and int8, and r·(4 + 2 + e) for the
    product in int32, float16 and the compute dtype.

    Args:
        shape: (rows, columns): out and in features.
        quantize: How the base is loaded.
        element_bytes: Of a number in the compute dtype.
    """
    elements = prod(shape)
    match quantize:
        case "none":
            return 0
        case "int8":
            return elements * element_bytes + 4 * shape[0]
        case "nf4":
            return elements * element_bytes + 8 * -(-elements // NF4_BLOCK)
