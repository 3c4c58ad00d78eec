"""What a selection on a base weighs, whatever the way to run it. Bytes throughout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.memory.activations import activations, attends_by_document
from orchestrator.plan.memory.quantized import dequantize_scratch_bytes, quantized_bytes
from orchestrator.spec.models import Quantize
from orchestrator.work.remedies import AnchorPlan


@dataclass(frozen=True)
class Footprint:
    """What a selection on a base weighs, whatever the way to run it."""

    frozen_bytes: int
    """Weights that do not learn, as they are loaded: quantized matrices, the rest in the compute dtype."""
    statistics_bytes: int
    """Of these, what belongs to quantized matrices and is whole on every rank: scales and tables."""
    learning_counts: tuple[int, ...]
    """Elements of every tensor that learns, in the model's order; of an adapted matrix its A and its B."""
    restore_bytes: int
    """A copy of the unfrozen weights as the base holds them, so that the next trial finds the base unchanged."""
    largest_block_bytes: int
    head_bytes: int
    quantized: bool
    scratch_bytes: int
    """What the largest quantized matrix takes while it multiplies."""
    learning_blocks: int
    """Blocks from the cut up: those that a backward pass goes through."""
    kept_token_bytes: int
    """Activations that all of them keep for the backward pass, per token."""
    by_document_token_bytes: int
    """How much more that is where documents are computed apart; below zero where it is less."""
    by_document_on_cpu: bool
    """Whether a CPU computes attention document by document."""
    whole_token_bytes: int
    """What the largest of them keeps, per token."""
    pair_bytes: int
    """What one of them keeps per token and position of its row."""
    working_token_bytes: int
    """What the backward pass of one needs beside it, per token, at most."""
    at_weight_token_bytes: int
    """Likewise, when the gradient of its largest weight is made; below zero where part of what is kept is gone by then."""
    at_scores_token_bytes: int
    """Likewise, when the gradients of attention scores are made, beside `at_scores_pair_bytes`."""
    at_scores_pair_bytes: int
    """Likewise, per token and position of its row; 0 where attention is fused."""
    forward_token_bytes: int
    """What the forward pass of one block needs where nothing is kept, per token, at most."""
    head_learns: bool
    head_adapted: bool
    """Whether an adapter learns beside the output projection."""
    hidden_size: int
    logit_width: int
    """Vocabulary, or classes."""
    one_target_per_row: bool
    """Whether a row has one prediction, off its last position, instead of one for each supervised token."""
    element_bytes: int
    anchor_copies: int = 0
    """float32 numbers that an anchor holds beside each one that learns: where it was, and for EWC how much it matters."""
    converted_bytes: int = 0
    """Of the base, in the compute dtype, where its files hold another: loading cannot map those and makes a copy."""


def weigh(
    anatomy: ModelAnatomy, selection: LayerSelection, quantize: Quantize, element_bytes: int, *, num_classes: int = 0
) -> Footprint:
    """Weigh a selection.

    Quantization holds the blocks' matrices; embeddings, norms and the output projection stay in the compute dtype. What is
    unfrozen learns in the compute dtype, read from the original, while its quantized matrix waits beside it for the next
    trial: nothing of it has to be copied to be restored. A tied head is stored once.
    """
    matrices = {name for block in anatomy.linears for name in block} if quantize != "none" else set[str]()
    quantized = {name: quantized_bytes(anatomy.tensors[name].shape, quantize, element_bytes) for name in matrices}
    head_bytes = anatomy.vocab_size * anatomy.hidden_size * element_bytes
    loaded = {
        name: quantized[name].total if name in quantized else tensor.num_elements * element_bytes
        for name, tensor in anatomy.tensors.items()
    }
    if selection.unties_head:
        loaded[anatomy.head_weight] = head_bytes
    waiting = [name for name in selection.trainable if name in quantized]
    still = (*selection.frozen, *selection.adapted, *waiting)
    opened = matrices.difference(waiting)
    learning = set(selection.trainable)
    blocks = [
        sum(anatomy.tensors[name].num_elements * element_bytes if name in learning else loaded[name] for name in block)
        for block in anatomy.blocks
    ]
    learns = bool(selection.trainable or selection.adapted)
    every = activations(anatomy, selection, element_bytes)
    above = every[selection.cut :] if learns else []
    return Footprint(
        frozen_bytes=sum(loaded.get(name, 0) for name in still),
        statistics_bytes=sum(quantized[name].statistics for name in still if name in quantized),
        learning_counts=learning_counts(anatomy, selection, num_classes=num_classes),
        restore_bytes=sum(loaded[name] for name in selection.trainable if name in anatomy.tensors and name not in quantized),
        largest_block_bytes=max(blocks, default=0),
        head_bytes=head_bytes,
        quantized=quantize != "none",
        scratch_bytes=max(
            (dequantize_scratch_bytes(anatomy.tensors[name].shape, quantize, element_bytes) for name in opened), default=0
        ),
        learning_blocks=anatomy.num_blocks - selection.cut if learns else 0,
        kept_token_bytes=sum(block.kept_bytes for block in above),
        by_document_token_bytes=sum(block.by_document_bytes for block in above),
        by_document_on_cpu=attends_by_document(anatomy, "cpu", one_document_per_row=num_classes > 0),
        whole_token_bytes=max((block.kept_bytes for block in above), default=0),
        pair_bytes=max((block.kept_pair_bytes for block in every), default=0),
        working_token_bytes=max((block.working_bytes for block in above), default=0),
        at_weight_token_bytes=max((block.at_weight_bytes for block in above), default=0),
        at_scores_token_bytes=max((block.at_scores_bytes for block in above), default=0),
        at_scores_pair_bytes=max((block.at_scores_pair_bytes for block in above), default=0),
        forward_token_bytes=max(block.forward_bytes for block in every),
        head_learns=_head_learns(anatomy, selection),
        head_adapted=anatomy.head_weight in selection.adapted,
        hidden_size=anatomy.hidden_size,
        logit_width=num_classes or anatomy.vocab_size,
        one_target_per_row=num_classes > 0,
        element_bytes=element_bytes,
        converted_bytes=_converted_bytes(anatomy, element_bytes),
    )


def with_anchor(footprint: Footprint, anchor: AnchorPlan | None) -> Footprint:
    """Of a trial that such an anchor pulls."""
    return footprint if anchor is None else replace(footprint, anchor_copies=anchor.traits.copies)


def _head_learns(anatomy: ModelAnatomy, selection: LayerSelection) -> bool:
    """Itself, by an adapter, or as the embeddings that it is tied to."""
    own = anatomy.head_weight in (*selection.trainable, *selection.adapted)
    return own or (anatomy.tied and anatomy.embeddings[0] in selection.trainable)


def _converted_bytes(anatomy: ModelAnatomy, element_bytes: int) -> int:
    """Of the tensors whose files hold another dtype."""
    dtype = {2: "BF16", 4: "F32"}[element_bytes]
    return sum(tensor.num_elements * element_bytes for tensor in anatomy.tensors.values() if tensor.dtype != dtype)


def learning_counts(anatomy: ModelAnatomy, selection: LayerSelection, *, num_classes: int = 0) -> tuple[int, ...]:
    """Elements of each tensor that learns, as the engine lists them: in the model's order, an adapted one as A and B."""
    head = (anatomy.vocab_size, anatomy.hidden_size)
    shapes = {name: tensor.shape for name, tensor in anatomy.tensors.items()} | {
        tensor.name: tensor.shape for tensor in anatomy.new_tensors
    }
    shapes |= {anatomy.classifier_weight: (num_classes, anatomy.hidden_size), anatomy.classifier_bias: (num_classes,)}
    shapes.setdefault(anatomy.head_weight, head)
    trainable, adapted, rank = set(selection.trainable), set(selection.adapted), selection.lora_rank or 0
    counts: list[int] = []
    for name, shape in shapes.items():
        if name in trainable:
            counts.append(prod(shape))
        elif name in adapted:
            counts += [rank * shape[1], rank * shape[0]]
    return tuple(counts)
