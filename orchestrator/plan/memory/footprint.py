"""Memory footprint of a selection on a base, independent of the gang's configuration. All figures are bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.memory.activations import BlockActivations, Peak, activations, attends_by_document
from orchestrator.plan.memory.counted import counted_activations
from orchestrator.plan.memory.experts import NO_EXPERTS, ExpertFootprint, expert_footprint
from orchestrator.plan.memory.quantized import dequantize_scratch_bytes, quantized_bytes
from orchestrator.spec.models import Quantize
from orchestrator.work.artifact import new_shapes
from orchestrator.work.remedies import AnchorPlan


@dataclass(frozen=True)
class Footprint:
    """Memory footprint of a selection on a base, independent of the gang's configuration."""

    frozen_bytes: int
    """Frozen weights as loaded: quantized matrices, the rest in the compute dtype."""
    statistics_bytes: int
    """Part of the frozen weights that is not partitioned: scales and tables of quantized matrices."""
    learning_counts: tuple[int, ...]
    """Elements of every trainable tensor, in the model's order; for an adapted matrix those of its adapter."""
    restore_bytes: int
    """Copy of the unfrozen weights as in the base, so that the next trial finds the base unchanged."""
    largest_block_bytes: int
    head_bytes: int
    quantized: bool
    scratch_bytes: int
    """Temporary memory of the largest quantized matrix during its multiplication."""
    learning_blocks: int
    """Number of blocks from the cut up, through which the backward pass runs."""
    by_document_on_cpu: bool
    """True if attention runs document by document on a CPU."""
    kept_token_bytes: int
    """Activations that all of them keep for the backward pass, per token."""
    kept_pair_bytes: int
    """The same per token and position of its row."""
    kept_row_bytes: int
    """The same per row."""
    by_document_token_bytes: int
    """Bytes to add per token if documents are computed one by one; negative if that needs less."""
    backward_blocks: tuple[BlockActivations, ...]
    """Activations of each block among them that differs from the others."""
    forward_peaks: tuple[Peak, ...]
    """Peaks of the forward pass of one block if nothing is kept."""
    head_learns: bool
    head_adapted: bool
    """True if the output projection has an adapter, or rows of its own for new tokens."""
    hidden_size: int
    logit_width: int
    """Size of the vocabulary, or number of classes."""
    one_target_per_row: bool
    """Whether a row has one prediction, off its last position, instead of one for each supervised token."""
    own_logits: bool
    """True if the class computes logits at every position of a row (`Ways.projects` is False)."""
    element_bytes: int
    anchor_copies: int = 0
    """float32 values that an anchor holds per trainable element: its initial value, and for EWC its importance."""
    experts: ExpertFootprint = NO_EXPERTS
    converted_bytes: int = 0
    """Part of the base, in the compute dtype, that its files store in another dtype: it cannot be memory-mapped and is copied
    while loading."""


def make_footprint(
    anatomy: ModelAnatomy, selection: LayerSelection, quantize: Quantize, element_bytes: int, *, num_classes: int = 0
) -> Footprint:
    """Derive the footprint of a selection.

    Only the matrices of the blocks are quantized; embeddings, norms and the output projection stay in the compute dtype.
    Unfrozen weights are trained in the compute dtype, read from the original, while their quantized matrices stay in memory
    for the next trial, so that nothing has to be copied to restore them. A tied head is stored once.
    """
    matrices = {name for block in anatomy.linears for name in block} if quantize != "none" else set[str]()
    quantized = {name: quantized_bytes(anatomy.matrix_shape(name), quantize, element_bytes) for name in matrices}
    head_bytes = anatomy.vocab_size * anatomy.head_width * element_bytes
    loaded = {
        name: quantized[name].total if name in quantized else tensor.num_elements * element_bytes
        for name, tensor in anatomy.tensors.items()
    }
    # An untied head is a tensor of its own, besides the embedding that it was tied to.
    if selection.unties_head:
        loaded[anatomy.head_weight] = head_bytes
    waiting = [name for name in selection.trainable if name in quantized]
    still = (*selection.frozen, *selection.adapted, *waiting)
    opened = matrices.difference(waiting)
    learning, learns = set(selection.trainable), bool(selection.trainable or selection.adapted)
    blocks = [
        sum(anatomy.tensors[name].num_elements * element_bytes if name in learning else loaded[name] for name in block)
        for block in anatomy.blocks
    ]
    every = (counted_activations if anatomy.block_costs else activations)(anatomy, selection, element_bytes)
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
            (dequantize_scratch_bytes(anatomy.matrix_shape(name), quantize, element_bytes) for name in opened), default=0
        ),
        learning_blocks=anatomy.num_blocks - selection.cut if learns else 0,
        by_document_on_cpu=attends_by_document(anatomy, "cpu", one_document_per_row=num_classes > 0),
        kept_token_bytes=sum(block.kept_bytes for block in above),
        kept_pair_bytes=sum(block.kept_pair_bytes for block in above),
        kept_row_bytes=sum(block.kept_row_bytes for block in above),
        by_document_token_bytes=sum(block.by_document_bytes for block in above),
        backward_blocks=tuple(dict.fromkeys(above)),
        forward_peaks=tuple(dict.fromkeys(peak for block in every for peak in block.forward_peaks)),
        head_learns=_head_learns(anatomy, selection),
        head_adapted=anatomy.head_weight in selection.adapted or any(name.endswith(NEW_ROWS) for name in selection.trainable),
        hidden_size=anatomy.hidden_size,
        logit_width=num_classes or anatomy.vocab_size,
        one_target_per_row=num_classes > 0,
        own_logits=not anatomy.ways.projects and num_classes == 0,
        element_bytes=element_bytes,
        experts=expert_footprint(anatomy, selection, element_bytes),
        converted_bytes=_converted_bytes(anatomy, element_bytes),
    )


def with_anchor(footprint: Footprint, anchor: AnchorPlan | None) -> Footprint:
    """Return the footprint of a trial with this anchor."""
    return footprint if anchor is None else replace(footprint, anchor_copies=anchor.traits.copies)


def _head_learns(anatomy: ModelAnatomy, selection: LayerSelection) -> bool:
    """Return whether the head is trained: itself, by an adapter, or through the embeddings that it is tied to."""
    own = anatomy.head_weight in (*selection.trainable, *selection.adapted)
    return own or (anatomy.tied and anatomy.embeddings[0] in selection.trainable)


def _converted_bytes(anatomy: ModelAnatomy, element_bytes: int) -> int:
    """Return the size of the tensors that files store in another dtype."""
    dtype = {2: "BF16", 4: "F32"}[element_bytes]
    return sum(tensor.num_elements * element_bytes for tensor in anatomy.tensors.values() if tensor.dtype != dtype)


def learning_counts(anatomy: ModelAnatomy, selection: LayerSelection, *, num_classes: int = 0) -> tuple[int, ...]:
    """Return the elements of each trainable tensor in the engine's order: the model's, an adapted one as its adapter's."""
    head = (anatomy.vocab_size, anatomy.head_width)
    shapes = {name: tensor.shape for name, tensor in anatomy.tensors.items()} | {
        tensor.name: tensor.shape for tensor in anatomy.new_tensors
    }
    shapes |= {anatomy.classifier_weight: (num_classes, anatomy.classifier_inputs), anatomy.classifier_bias: (num_classes,)}
    shapes.setdefault(anatomy.head_weight, head)
    shapes |= new_shapes(anatomy, num_classes)
    trainable, adapted, lora_rank = set(selection.trainable), set(selection.adapted), selection.lora_rank or 0
    counts: list[int] = []
    for name, shape in shapes.items():
        if name in trainable:
            counts.append(prod(shape))
        elif name in adapted:
            counts += [prod(each) for each in selection.adapter_kind.shapes(anatomy.matrix_shape(name), lora_rank).values()]
    return tuple(counts)
