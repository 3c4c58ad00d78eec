"""Activations that a block keeps for its backward pass, and memory that this pass needs in addition. Bytes per token.

The counts follow the operators in transformers' blocks and the tensors that torch saves for each, after Korthikanti et al.
2022 ("Reducing Activation Recomputation", section 4.1), redone for RMS norms, gated MLPs, LoRA and experts; fused attention
keeps no scores. `scripts/bench memory` compares them with every allocation of a step.

h is the hidden size, q the width of all query heads, f the MLP width, r the LoRA rank, e the bytes of an element of the
compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from orchestrator.anatomy.selection import is_attention
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy

NONLINEARITY_KEEPS = {"relu": 0, "gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
"""Tensors of the MLP's width that a nonlinearity saves besides its result. A kernel of torch's own saves its input (1, the
default); ReLU saves only its result; those that transformers composes of several operators save what each of these saves."""
ROUTING_BYTES = 64
"""Bytes per token and chosen expert in a block with experts: sort order, permutation and weights, in int64 and float32."""


FUSED_PROJECTIONS = ("qkv_proj", "query_key_value", "c_attn")
"""Modules that compute query, key and value in one product: a layout that has one of another name must add it here."""


class Peak(NamedTuple):
    """A peak of memory in a pass of a block, in bytes besides those kept; negative if part of them is freed."""

    token_bytes: int
    pair_bytes: int = 0
    """Per token and position of its row."""
    row_bytes: int = 0
    """Per row."""
    at_weight: bool = False
    """Whether the gradient of a weight, which is not part of it, exists at the same time."""


@dataclass(frozen=True)
class BlockActivations:
    """Activations of one block, in bytes per token and, for those of pairs, per token and position of its row."""

    kept_bytes: int
    """Bytes kept from its forward to its backward pass."""
    by_document_bytes: int
    """Bytes to add to them if documents are computed one by one; negative if that needs less."""
    kept_pair_bytes: int
    """Bytes kept per pair (attention masks and scores)."""
    peaks: tuple[Peak, ...]
    """Its backward pass, besides those kept and the gradients of its input and output; which peak is the highest depends on the
    shape of the rows."""
    forward_peaks: tuple[Peak, ...]
    """The same of its forward pass if nothing is kept, besides its input and output, counted twice."""
    kept_row_bytes: int = 0
    """Bytes kept per row (the states of recurrent blocks)."""


def activations(anatomy: ModelAnatomy, selection: LayerSelection, element_bytes: int) -> list[BlockActivations]:
    """Return the activations of every block, as if all were above the cut."""
    learning, adapted = frozenset(selection.trainable), frozenset(selection.adapted)
    return [_block(anatomy, selection, block, learning, adapted, element_bytes) for block in range(anatomy.num_blocks)]


class _KeptInputs(NamedTuple):
    """Which matrices of a block keep their inputs for the gradients of weights or adapters."""

    attention: bool
    """Query, key and value."""
    attention_output: bool
    mlp: bool
    """The first matrices of the MLP."""
    mlp_output: bool


def _block(
    anatomy: ModelAnatomy,
    selection: LayerSelection,
    block: int,
    learning: frozenset[str],
    adapted: frozenset[str],
    element_bytes: int,
) -> BlockActivations:
    names = anatomy.blocks[block]
    trained = (learning | adapted).intersection(names)
    kept_inputs = _kept_inputs(anatomy, block, trained)
    # Backward ends in the block at the cut: where only its MLP is trained, it does not get to the attention.
    attends = (
        block != selection.cut
        or selection.trains_embeddings
        or not trained
        or kept_inputs.attention
        or kept_inputs.attention_output
    )
    mlp, working, at_weight = _mlp(anatomy, block, learning, element_bytes, kept_inputs)
    kept = (
        _norms(anatomy, names, learning, element_bytes)
        + (_attention(anatomy, block, element_bytes, kept_inputs) if attends else 0)
        + mlp
        + element_bytes * _by_adapters(anatomy, selection, [name for name in names if name in adapted], kept_inputs)
    )
    pairs = _pairs(anatomy, element_bytes)
    return BlockActivations(
        kept_bytes=kept,
        by_document_bytes=_by_document(anatomy, element_bytes, kept_inputs) if attends else 0,
        kept_pair_bytes=pairs,
        peaks=(
            Peak(working),
            Peak(at_weight, at_weight=True),
            # Attention scores are last: what the MLP kept is freed by then.
            Peak(-mlp, _score_gradients(anatomy, element_bytes)),
        ),
        forward_peaks=(Peak(4 * element_bytes * _mlp_width(anatomy, block), pairs),),
    )


def _by_adapters(anatomy: ModelAnatomy, selection: LayerSelection, names: list[str], kept_inputs: _KeptInputs) -> int:
    """Return the numbers that the adapters of a block keep per token.

    With dropout each keeps a copy of its input and a mask, which torch's CPU kernel makes in the compute dtype (the CUDA
    kernel's takes a byte), in place of the inputs that several would share.
    """
    kept = sum(kept_by_adapter(anatomy, selection, name) for name in names)
    if not selection.adapter.dropout:
        return kept
    shared = anatomy.hidden_size * (kept_inputs.attention + kept_inputs.mlp) + anatomy.intermediate_size * kept_inputs.mlp_output
    return kept + 2 * sum(anatomy.matrix_shape(name)[-1] for name in names) - shared


def kept_by_adapter(anatomy: ModelAnatomy, selection: LayerSelection, name: str) -> int:
    """Return the numbers that the adapter of one weight keeps per token, besides the input of a linear layer.

    Of routed experts, each of the k that a token is routed to keeps its row of the input and what it is reduced to
    (`train.model.experts`), whose width is filled up to a multiple of 8.
    """
    shape, lora_rank = anatomy.matrix_shape(name), selection.lora_rank or 0
    if name not in anatomy.routed:
        return selection.adapter_kind.kept_elements(shape, lora_rank)
    assert anatomy.experts is not None
    return anatomy.experts.experts_per_token * (shape[-1] + lora_rank + -lora_rank % 8) if anatomy.experts.grouped else 0


def _kept_inputs(anatomy: ModelAnatomy, block: int, keeping: frozenset[str]) -> _KeptInputs:
    linears = anatomy.linears[block]
    if keeping.issuperset(linears) or (anatomy.stacked and anatomy.stacked[block]):
        return _KeptInputs(*[not keeping.isdisjoint(anatomy.blocks[block])] * 4)
    attention = [name for name in linears if is_attention(anatomy, name)]
    mlp = [name for name in linears if name not in attention]
    return _KeptInputs(*(not keeping.isdisjoint(part) for part in (attention[:-1], attention[-1:], mlp[:-1], mlp[-1:])))


def _norms(anatomy: ModelAnatomy, names: tuple[str, ...], learning: frozenset[str], e: int) -> int:
    """Return what norms keep. RMS norms compute in float32 and keep their input and its scale, 4h + 4, and if the norm is
    trained also the normalized input, e·h. torch's layer norm keeps its input in the compute dtype, a mean and a scale: e·h +
    8. Norms of queries and keys have the width of the heads instead of h."""
    total = 0
    for name in names:
        shape = anatomy.tensors[name].shape
        # Norms are found by their names (`ln_` is GPT-2's) and by being vectors; q_norm and k_norm run once per head. A layout
        # that names its norms otherwise must be added here.
        if ("norm" not in name.lower() and "ln_" not in name) or len(shape) != 1 or not name.endswith("weight"):
            continue
        if shape[0] == anatomy.head_dim and anatomy.head_dim != anatomy.hidden_size:
            heads = anatomy.num_heads if "q_norm" in name else anatomy.num_kv_heads
            width, rows = heads * anatomy.head_dim, heads
        else:
            width, rows = shape[0], 1
        if anatomy.norm == "rms":
            total += 4 * width + 4 * rows + (e * width if name in learning else 0)
        else:
            total += e * width + 8 * rows
    return total


def _attention(anatomy: ModelAnatomy, block: int, e: int, kept_inputs: _KeptInputs) -> int:
    """Return what attention keeps: the input of the projections, e·h, if they are trained; query, key and value as the kernel
    takes them (with a mask, keys and values are repeated to the number of query heads) and its result, e·4q; a float32 scale
    per head. If one matrix computes query, key and value, and no head shares a value, the value is a view of its product,
    which is kept whole: e·2q more."""
    h, q = anatomy.hidden_size, anatomy.num_heads * anatomy.head_dim
    whole = any(name.rpartition(".")[0].endswith(FUSED_PROJECTIONS) for name in anatomy.linears[block])
    views = 2 * e * q if whole and anatomy.num_heads == anatomy.num_kv_heads else 0
    return e * (h if kept_inputs.attention else 0) + 4 * e * q + 4 * anatomy.num_heads + views


def _by_document(anatomy: ModelAnatomy, e: int, kept_inputs: _KeptInputs) -> int:
    """Return the difference if documents are computed one by one: without a mask the kernel takes keys and values as they are,
    not repeated to the query heads. The results of the documents are kept besides their concatenation, e·q, if that is kept as
    the input of the output projection."""
    repeats = anatomy.num_heads - anatomy.num_kv_heads
    return e * anatomy.head_dim * ((anatomy.num_heads if kept_inputs.attention_output else 0) - 2 * repeats)


def _pairs(anatomy: ModelAnatomy, e: int) -> int:
    """Return what is kept per pair of positions in a row. The fused kernel keeps the mask as numbers, e. Without it each head
    keeps its scores before their cap (the tanh's result, e), their softmax in float32 (4), and the rounded softmax (e)."""
    return e if anatomy.attention == "fused" else anatomy.num_heads * (2 * e + 4)


def _score_gradients(anatomy: ModelAnatomy, e: int) -> int:
    """Return the bytes per pair of positions if no fused kernel supports the layout: the gradients of each head's softmax and
    scores in float32 (8), after the rounded softmax (e) is freed."""
    return 0 if anatomy.attention == "fused" else anatomy.num_heads * (8 - e)


def _mlp(anatomy: ModelAnatomy, block: int, learning: frozenset[str], e: int, kept_inputs: _KeptInputs) -> tuple[int, int, int]:
    """Return (kept, working, at_weight) of the MLP.

    Kept: what the nonlinearity keeps, its result, and if gated the other half, e·f each; if its matrices are trained, also
    their inputs, e·h and, for the down projection, e·f. The backward pass peaks between the two products, when a gated MLP has
    six tensors of its width in memory, a plain one four.

    With experts, each of the k that a token is routed to has its own copies of these, its result before weighting (e·h) and,
    if experts are trained, its sorted copy of the input (e·h). While results are weighted, three more of these exist in the
    backward pass (the gradient, sorted, weighted), which is the peak if experts are narrow. A shared expert is a gated MLP of
    its own width.

    Besides the gradient of a dense MLP's weight, one tensor of its width exists; the largest weight of experts is their first
    (gate and up in one), and at that time only the gradients of its two results remain of the inner tensors.
    """
    h, experts = anatomy.hidden_size, anatomy.experts
    gated = anatomy.mlp == "gated"
    inner = NONLINEARITY_KEEPS.get(anatomy.activation, 1) + 1 + gated
    most = 6 if gated else inner + 2
    if experts is None or not anatomy.stacked[block]:
        tensors = inner + (kept_inputs.mlp_output if gated else 0)
        width = anatomy.intermediate_size
        return e * (h * kept_inputs.mlp + width * tensors), e * width * (most - tensors), e * width
    # The routed experts of all tokens are computed as one batch of k copies per token.
    k, learns = experts.experts_per_token, any(name in learning for name in anatomy.stacked[block])
    routed = k * (e * (experts.intermediate_size * (inner + learns) + h * (1 + learns)) + ROUTING_BYTES)
    shared = e * experts.shared_intermediate_size * (inner + kept_inputs.mlp_output)
    wide = k * experts.intermediate_size * (most - inner - learns) + experts.shared_intermediate_size * (
        most - inner - kept_inputs.mlp_output
    )
    wide = max(wide, 3 * k * h)
    gone = e * k * (experts.intermediate_size * (inner + learns - 2) + h * learns)
    return e * h * kept_inputs.mlp + routed + shared, e * wide, -gone


def _mlp_width(anatomy: ModelAnatomy, block: int) -> int:
    experts = anatomy.experts
    if experts is None or not anatomy.stacked[block]:
        return anatomy.intermediate_size
    return experts.experts_per_token * experts.intermediate_size + experts.shared_intermediate_size


def attention_of(anatomy: ModelAnatomy, device: str, *, one_document_per_row: bool) -> Literal["by_document", "sdpa", "eager"]:
    """Return the implementation of attention with which the base is loaded."""
    if anatomy.attention == "eager" or anatomy.ways.attention == "eager":
        return "eager"
    return "by_document" if attends_by_document(anatomy, device, one_document_per_row=one_document_per_row) else "sdpa"


def attends_by_document(anatomy: ModelAnatomy, device: str, *, one_document_per_row: bool) -> bool:
    """Return whether attention runs document by document (`train.model.attention`) instead of on the whole row under a mask.

    This is so on CPUs, for decoders that a fused kernel supports. A row that holds one document needs no separation.
    """
    separable = anatomy.kind == "decoder" and anatomy.attention == "fused" and anatomy.ways.attention == "by_document"
    return device == "cpu" and separable and anatomy.ways.packs and not one_document_per_row
