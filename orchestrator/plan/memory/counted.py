"""Activations of blocks whose costs were counted on the class (`anatomy/costs.py`), in the terms of `plan.memory.activations`."""

from __future__ import annotations

from orchestrator.anatomy.costs import Size
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.memory.activations import BlockActivations, Peak, kept_by_adapter


def counted_activations(anatomy: ModelAnatomy, selection: LayerSelection, element_bytes: int) -> list[BlockActivations]:
    """Return the activations of every block, as if all were above the cut."""
    trainable, adapted = frozenset(selection.trainable), frozenset(selection.adapted)
    return [_block(anatomy, selection, block, trainable, adapted, element_bytes) for block in range(anatomy.num_blocks)]


def _block(
    anatomy: ModelAnatomy,
    selection: LayerSelection,
    block: int,
    trainable: frozenset[str],
    adapted: frozenset[str],
    e: int,
) -> BlockActivations:
    """Return what a block keeps and needs under a selection.

    - Kept: the union over its trained and adapted modules and, above the cut, its input (`Kept`). An adapter adds what its kind
      keeps (`AdapterKind.kept_elements`); with dropout it keeps a copy of its input and a mask instead of the layer's own input.
    - Peaks are counted with every linear layer adapted, or with everything trained, and hold what is kept then. With fewer
      modules less is kept, and what is freed before the peak is not subtracted: an upper bound.
    """
    costs = anatomy.costs_of(block)
    names = anatomy.blocks[block]
    prefix = anatomy.block_prefix.format(block)
    linears = {name.removeprefix(prefix).rpartition(".")[0] for name in anatomy.linears[block]}
    own, on = ({name.removeprefix(prefix).rpartition(".")[0] for name in names if name in some} for some in (trainable, adapted))
    kept, by_document = (
        costs.keeps(
            each,
            passing=receives_gradient(anatomy, selection, block),
            adapted=bool(on) or not own.isdisjoint(linears),
            others=not own.issubset(linears),
            inputs=own if selection.adapter.dropout else own | on,
        )
        for each in (costs.kept, costs.kept_by_document)
    )
    token_bytes, pair_bytes, row_bytes = (
        sum(counted(size, e) for size in kept) for counted in (Size.per_token, Size.per_pair, Size.per_row)
    )
    ends = 2 * e * anatomy.hidden_size
    peaks = [(size, False) for size in (costs.trained_peaks if own else costs.adapted_peaks)]
    peaks += [(size, True) for size in costs.at_weight_peaks] if own else []
    return BlockActivations(
        kept_bytes=token_bytes + e * _by_adapters(anatomy, selection, [name for name in names if name in adapted]),
        by_document_bytes=sum(size.per_token(e) for size in by_document) - token_bytes if costs.kept_by_document else 0,
        kept_pair_bytes=pair_bytes,
        peaks=tuple(
            Peak(size.per_token(e) - token_bytes - ends, size.per_pair(e) - pair_bytes, size.per_row(e) - row_bytes, at_weight)
            for size, at_weight in peaks
        ),
        kept_row_bytes=row_bytes,
        forward_peaks=tuple(
            Peak(size.per_token(e) - 2 * ends, size.per_pair(e), size.per_row(e)) for size in costs.forward_peaks
        ),
    )


def receives_gradient(anatomy: ModelAnatomy, selection: LayerSelection, block: int) -> bool:
    """Return whether something before a block is trained, so that its input has a gradient."""
    return block > selection.cut or not set(selection.trainable).isdisjoint(anatomy.embeddings)


def _by_adapters(anatomy: ModelAnatomy, selection: LayerSelection, names: list[str]) -> int:
    """Return the numbers that the adapters of a block keep per token, besides the inputs of their layers."""
    kept = sum(kept_by_adapter(anatomy, selection, name) for name in names)
    return kept + (2 * sum(anatomy.matrix_shape(name)[-1] for name in names) if selection.adapter.dropout else 0)
