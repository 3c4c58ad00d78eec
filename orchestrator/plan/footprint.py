"""What a selection on a base weighs, whatever the way to run it. Bytes throughout."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.spec.models import Quantize

NF4_BLOCK = 64
"""Weights that share a scale in nf4."""
NF4_BITS = 4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * 256)
"""Bits of a weight in nf4 with double quantization: 4, an 8-bit scale per 64 weights, a float32 scale per 256 of
those scales; 4.127 in all (Dettmers et al. 2023, QLoRA, section 3)."""
INT8_BITS = 8


@dataclass(frozen=True)
class Footprint:
    """What a selection on a base weighs, whatever the way to run it."""

    frozen_bytes: int
    """Weights that do not learn, as they are loaded: quantized matrices, the rest in the compute dtype."""
    trainable_elements: int
    restore_bytes: int
    """A copy of the unfrozen weights as the base holds them, so that the next trial finds the base unchanged."""
    largest_block_bytes: int
    head_bytes: int
    quantized: bool
    largest_linear_elements: int
    learning_blocks: int
    """Blocks from the cut up: those that a backward pass goes through."""
    block_token_bytes: int
    """Activations that one block keeps for the backward pass, per token."""
    hidden_size: int
    logit_width: int
    """Vocabulary, or classes."""
    classify: bool
    element_bytes: int
    converted_bytes: int = 0
    """Of the base, in the compute dtype, where its files hold another: loading cannot map those and makes a copy."""


def weigh(
    anatomy: ModelAnatomy, selection: LayerSelection, quantize: Quantize, element_bytes: int, *, num_classes: int = 0
) -> Footprint:
    """Weigh a selection.

    Quantization holds the blocks' matrices; embeddings, norms and the output projection stay in the compute dtype,
    and so does what is unfrozen (it is loaded in 16 bit from the original). A tied head is stored once.
    """
    matrices = {name for block in anatomy.linears for name in block} if quantize != "none" else set[str]()
    bits = {"none": 0.0, "nf4": NF4_BITS, "int8": float(INT8_BITS)}[quantize]
    head_bytes = anatomy.vocab_size * anatomy.hidden_size * element_bytes
    loaded = {
        name: round(tensor.num_elements * bits / 8) if name in matrices else tensor.num_elements * element_bytes
        for name, tensor in anatomy.tensors.items()
    }
    if selection.unties_head:
        loaded[anatomy.head_weight] = head_bytes
    learns = bool(selection.trainable or selection.adapted)
    return Footprint(
        frozen_bytes=sum(loaded.get(name, 0) for name in (*selection.frozen, *selection.adapted)),
        trainable_elements=selection.num_trainable_parameters,
        restore_bytes=sum(loaded[name] for name in selection.trainable if name in anatomy.tensors),
        largest_block_bytes=max((sum(loaded.get(name, 0) for name in block) for block in anatomy.blocks), default=0),
        head_bytes=head_bytes,
        quantized=quantize != "none",
        largest_linear_elements=max(
            (anatomy.tensors[name].num_elements for block in anatomy.linears for name in block if name in anatomy.tensors),
            default=0,
        ),
        learning_blocks=anatomy.num_blocks - selection.cut if learns else 0,
        block_token_bytes=block_activation_bytes(anatomy, selection, element_bytes),
        hidden_size=anatomy.hidden_size,
        logit_width=num_classes or anatomy.vocab_size,
        classify=num_classes > 0,
        element_bytes=element_bytes,
        converted_bytes=sum(
            tensor.num_elements * element_bytes
            for tensor in anatomy.tensors.values()
            if tensor.dtype != {2: "BF16", 4: "F32"}[element_bytes]
        ),
    )


def block_activation_bytes(anatomy: ModelAnatomy, selection: LayerSelection, element_bytes: int) -> int:
    """Bytes a token that one block keeps for its backward pass, without checkpointing.

    With hidden size h, query width q, MLP width f and elements of e bytes:

    - two norms, computed in float32, keep their inputs and scales: 2·(4h + 4); a norm that learns also keeps what it
      scaled: e·h each
    - input of the query, key and value projections, and of the MLP's two: 2·e·h
    - query, key and value for the attention kernel (keys and values repeated to the query heads, which a mask asks
      for), its output, and a float32 scale per head: 4·e·q + 4·heads
    - MLP: gate before and after its nonlinearity, up, their product: 4·e·f
    - LoRA: what A makes of the input, e·r for each of the block's matrices

    The count follows Korthikanti et al. 2022 ("Reducing Activation Recomputation", section 4.1), redone for RMS norms
    and a gated MLP; fused attention keeps no scores, so their 5·a·s/h term is absent, but it keeps the mask (see
    `memory._activation_terms`). A test compares it with what torch keeps. A block above the cut that does not learn keeps
    less: for it the count is an upper bound.
    """
    h, f, q = anatomy.hidden_size, anatomy.intermediate_size, anatomy.num_heads * anatomy.head_dim
    norms = 2 * (4 * h + 4) + (2 * element_bytes * h if selection.tune == "full" else 0)
    adapters = element_bytes * (selection.lora_rank or 0) * max((len(block) for block in anatomy.linears), default=0)
    return norms + element_bytes * (2 * h + 4 * q + 4 * f) + 4 * anatomy.num_heads + adapters
