"""The values of a frozen weight after quantization to nf4 or int8: those that training multiplied with.

nf4 as in training (QLoRA, Dettmers et al. 2023): blocks of 64, double quantization (the blocks' scales in 8 bits, 256 at a
time, as bitsandbytes fixes it). bitsandbytes' own CPU quantizer takes about 90 ns an element, so the way there and back is
made here in one go, some rows at a time; tests compare it with bitsandbytes and with a loaded model, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes import functional

from orchestrator.spec.models import Quantize
from orchestrator.train.model.int8 import held_in_8_bits

BLOCK = 64
SCALE_BLOCK = 256
PIECE_ELEMENTS = 1 << 18
BINS = 64
"""Number of equal bins over [-1, 1]: narrow enough that each holds at most one boundary between two codes."""


@dataclass(frozen=True)
class HeldWeight:
    """Weight[out, in] whose rows can be read with the values that training used."""

    weight: torch.Tensor
    """Stored weight, memory-mapped from its file."""
    absmax: torch.Tensor
    """float32[out * in / 64]: exact scale of each block."""
    held_absmax: torch.Tensor
    """Scales after their own quantization."""
    dtype: torch.dtype
    """Type that training loaded the weight as, and dequantized it to."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [stop - start, in] in `dtype`."""
        width = self.weight.shape[1]
        blocks = slice(start * width // BLOCK, stop * width // BLOCK)
        # Multiplying by the reciprocal, and the 1e-38, reproduce bitsandbytes' rounding bit by bit; dividing would not.
        scaled = _blocks(self.weight[start:stop], self.dtype) * (1.0 / self.absmax[blocks].clamp(min=1e-38))[:, None]
        values = _nearest_codes(scaled.clamp_(-1, 1)).mul_(self.held_absmax[blocks, None])
        return values.reshape(stop - start, width).to(self.dtype)


@dataclass(frozen=True)
class HeldInt8:
    """Weight[out, in] whose rows can be read with the values that training in 8 bits used."""

    weight: torch.Tensor
    """Stored weight, memory-mapped from its file."""
    dtype: torch.dtype
    """Type that training loaded the weight as, and dequantized it to."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [stop - start, in] in `dtype`."""
        return held_in_8_bits(self.weight[start:stop].contiguous(), self.dtype)


Held = HeldWeight | HeldInt8 | torch.Tensor


def hold(weight: torch.Tensor, dtype: torch.dtype, quantize: Quantize) -> Held:
    """Return a weight[out, in] as training held it, with readable rows; see `hold_quantized`."""
    return HeldInt8(weight, dtype) if quantize == "int8" else hold_quantized(weight, dtype)


def rows_of(held: Held, start: int, stop: int) -> torch.Tensor:
    """Return rows [stop - start, in] of a weight that is stored, or held quantized."""
    return held[start:stop] if isinstance(held, torch.Tensor) else held.rows(start, stop)


def hold_quantized(weight: torch.Tensor, dtype: torch.dtype) -> HeldWeight | torch.Tensor:
    """Quantize a weight[out, in] to nf4 and return it with readable rows.

    Where a row is no whole number of blocks it comes back as a whole tensor: bitsandbytes' CPU kernel (0.50) then
    places the blocks by the tensor's shape, and what training saw is what that kernel gives.

    Args:
        weight: As stored; never changed.
        dtype: What training loaded it as, before quantizing.
    """
    num_rows, width = weight.shape
    # Blocks would cross rows here, see above.
    if width % BLOCK:
        codes, state = functional.quantize_4bit(weight.to(dtype), blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        return functional.dequantize_4bit(codes, state)
    # The scales need a first pass over the weight, since their own quantization uses the mean of all of them.
    step = max(1, PIECE_ELEMENTS // width)
    pieces = [weight[start : start + step] for start in range(0, num_rows, step)]
    absmax = torch.cat([_blocks(piece, dtype).abs_().amax(dim=-1) for piece in pieces])
    return HeldWeight(weight, absmax, _double_quantized(absmax), dtype)


def _blocks(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float32[elements / 64, 64], a copy."""
    return rows.to(dtype).to(torch.float32, copy=True).reshape(-1, BLOCK)


def _double_quantized(absmax: torch.Tensor) -> torch.Tensor:
    """Quantize the blocks' scales to 8 bits and back, as `compress_statistics` does."""
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=SCALE_BLOCK)
    return (functional.dequantize_blockwise(codes, state) + offset).float()


def _nearest_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Map float32[n, 64] in [-1, 1] to the code that bitsandbytes picks: the first whose upper boundary is not exceeded."""
    boundaries, values = _tables()
    bins = ((scaled + 1) * (BINS / 2)).to(torch.int32).clamp_(max=BINS - 1).reshape(-1)
    # A table lookup instead of a search among 16 codes: one comparison for each element.
    above = scaled.reshape(-1) > boundaries.index_select(0, bins)
    return values.index_select(0, bins.mul_(2).add_(above)).reshape(scaled.shape)


@cache
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each bin the boundary within it (2 if there is none), and the codes below and above that boundary."""
    codes = functional.get_4bit_type("nf4", device="cpu")
    midpoints = (codes[:-1] + codes[1:]) / 2
    edges = torch.linspace(-1, 1, BINS + 1)
    assert (midpoints[:, None] - edges).abs().min() > 1e-5, "a boundary lies on the edge of a bin"
    boundaries, values = torch.full((BINS,), 2.0), torch.empty(2 * BINS)
    for number in range(BINS):
        inside = midpoints[(midpoints > edges[number]) & (midpoints < edges[number + 1])]
        assert inside.numel() <= 1, "a bin holds two boundaries"
        below = int((midpoints < edges[number]).sum())
        boundaries[number : number + 1] = inside if inside.numel() else 2.0
        values[2 * number], values[2 * number + 1] = codes[below], codes[min(below + 1, len(codes) - 1)]
    return boundaries, values
