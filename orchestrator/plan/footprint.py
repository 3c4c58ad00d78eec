"""What a selection on a base weighs, whatever the way to run it. Bytes throughout."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.activations import activations
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
    kept_token_bytes: int
    """Activations that all of them keep for the backward pass, per token."""
    whole_token_bytes: int
    """What the largest of them keeps, per token."""
    working_token_bytes: int
    """What the backward pass of one needs beside it, per token, at most."""
    forward_token_bytes: int
    """What the forward pass of one block needs where nothing is kept, per token, at most."""
    head_learns: bool
    largest_learning_elements: int
    """Of one tensor."""
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
    every = activations(anatomy, selection, element_bytes)
    above = every[selection.cut :] if learns else []
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
        kept_token_bytes=sum(block.kept_bytes for block in above),
        whole_token_bytes=max((block.kept_bytes for block in above), default=0),
        working_token_bytes=max((block.working_bytes for block in above), default=0),
        forward_token_bytes=max(block.forward_bytes for block in every),
        head_learns=anatomy.head_weight in (*selection.trainable, *selection.adapted),
        largest_learning_elements=max((_elements(anatomy, name) for name in selection.trainable), default=0),
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


def _elements(anatomy: ModelAnatomy, name: str) -> int:
    if name in anatomy.tensors:
        return anatomy.tensors[name].num_elements
    return anatomy.vocab_size * anatomy.hidden_size if name == anatomy.head_weight else 0
