"""What a block of the base keeps for its backward pass, and what that pass needs beside it. Bytes per token.

The counts follow the operators that transformers' blocks run and what torch saves of each, after Korthikanti et al. 2022
("Reducing Activation Recomputation", section 4.1), redone for RMS norms, gated MLPs, LoRA and experts; attention is
fused and keeps no scores. `scripts/bench memory` compares them with every allocation of a step.

h is the hidden size, q the width of all query heads, f the MLP width, r the LoRA rank, e the bytes of an element of the
compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy

NONLINEARITY_KEEPS = {"relu": 0, "gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
"""Tensors of the MLP's width that a nonlinearity keeps beside its result. A kernel of torch's own keeps its input (1, the
rule); ReLU keeps its result alone; those that transformers composes of several operators keep what each of these does."""
ROUTING_BYTES = 64
"""Of a token in a block with experts, for each expert that it goes to: sort, permutation and weights, in int64 and float32."""


FUSED_PROJECTIONS = ("qkv_proj", "query_key_value", "c_attn")
"""Modules that make query, key and value in one product."""


@dataclass(frozen=True)
class BlockActivations:
    """One block, per token."""

    kept_bytes: int
    """From its forward to its backward pass."""
    by_document_bytes: int
    """How much more of that there is where documents are computed apart; below zero where it is less."""
    kept_pair_bytes: int
    """Likewise, per token and position of its row."""
    working_bytes: int
    """Beside what is kept, at the largest moment of its backward pass."""
    at_weight_bytes: int
    """Likewise, when the gradient of its largest weight is made; below zero where part of what is kept is gone by then."""
    at_scores_bytes: int
    """Likewise, when the gradients of attention scores are made, beside `at_scores_pair_bytes`: what the MLP kept is gone."""
    at_scores_pair_bytes: int
    """Likewise, per token and position of its row."""
    forward_bytes: int
    """At the largest moment of its forward pass, where nothing is kept."""


def activations(anatomy: ModelAnatomy, selection: LayerSelection, element_bytes: int) -> list[BlockActivations]:
    """Weigh every block, as if all were above the cut."""
    learning, adapted = frozenset(selection.trainable), frozenset(selection.adapted)
    return [
        _block(anatomy, block, learning, adapted, selection.lora_rank or 0, element_bytes) for block in range(anatomy.num_blocks)
    ]


def _block(
    anatomy: ModelAnatomy, block: int, learning: frozenset[str], adapted: frozenset[str], lora_rank: int, element_bytes: int
) -> BlockActivations:
    names = anatomy.blocks[block]
    pairs = sum(name in adapted for name in names)
    needs_inputs = pairs > 0 or any(name in learning for name in names)
    mlp, working, at_weight = _mlp(anatomy, block, learning, element_bytes, needs_inputs=needs_inputs)
    kept = (
        _norms(anatomy, names, learning, element_bytes)
        + _attention(anatomy, block, element_bytes, needs_inputs=needs_inputs)
        + mlp
        + element_bytes * lora_rank * pairs
    )
    forward = 4 * element_bytes * _mlp_width(anatomy, block)
    return BlockActivations(
        kept_bytes=kept,
        by_document_bytes=_by_document(anatomy, element_bytes, needs_inputs=needs_inputs),
        kept_pair_bytes=_pairs(anatomy, element_bytes),
        working_bytes=working,
        at_weight_bytes=at_weight,
        at_scores_bytes=-mlp,
        at_scores_pair_bytes=_score_gradients(anatomy, element_bytes),
        forward_bytes=forward,
    )


def _norms(anatomy: ModelAnatomy, names: tuple[str, ...], learning: frozenset[str], e: int) -> int:
    """RMS norms compute in float32 and keep their input and its scale: 4h + 4, and what they scaled, e·h, where the
    norm learns. torch's layer norm keeps its input in the compute dtype, a mean and a scale: e·h + 8. Norms of queries and
    keys run over the heads' width instead of h.
    """
    total = 0
    for name in names:
        shape = anatomy.tensors[name].shape
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


def _attention(anatomy: ModelAnatomy, block: int, e: int, *, needs_inputs: bool) -> int:
    """The input of the projections, e·h, where they learn; query, key and value as the kernel takes them (a mask has the
    keys and values repeated to the query heads) and its result, e·4q; a float32 scale per head. Where one matrix makes query,
    key and value, and no head shares a value, the value is a view of its product, which is kept whole: e·2q more.
    """
    h, q = anatomy.hidden_size, anatomy.num_heads * anatomy.head_dim
    whole = any(name.rpartition(".")[0].endswith(FUSED_PROJECTIONS) for name in anatomy.linears[block])
    views = 2 * e * q if whole and anatomy.num_heads == anatomy.num_kv_heads else 0
    return e * (h if needs_inputs else 0) + 4 * e * q + 4 * anatomy.num_heads + views


def _by_document(anatomy: ModelAnatomy, e: int, *, needs_inputs: bool) -> int:
    """Without a mask the kernel takes keys and values as they are, not repeated to the query heads. The results of the
    documents are kept beside their concatenation, e·q, where that is kept as an input of the output projection.
    """
    repeats = anatomy.num_heads - anatomy.num_kv_heads
    return e * anatomy.head_dim * ((anatomy.num_heads if needs_inputs else 0) - 2 * repeats)


def _pairs(anatomy: ModelAnatomy, e: int) -> int:
    """Per pair of positions in a row. The fused kernel keeps the mask as numbers, e. Without it each head keeps its scores
    before their cap (the tanh's result, e), their softmax in float32 (4), and that rounded (e).
    """
    return e if anatomy.attention == "fused" else anatomy.num_heads * (2 * e + 4)


def _score_gradients(anatomy: ModelAnatomy, e: int) -> int:
    """Per pair of positions, where no fused kernel serves the layout: the gradient of each head's softmax and of its scores, in
    float32 (8), when the rounded softmax (e) is gone again."""
    return 0 if anatomy.attention == "fused" else anatomy.num_heads * (8 - e)


def _mlp(anatomy: ModelAnatomy, block: int, learning: frozenset[str], e: int, *, needs_inputs: bool) -> tuple[int, int, int]:
    """(kept, working, at_weight).

    Kept: what the nonlinearity keeps and its result, and where gated the other half: e·f each; where its matrices learn
    their inputs too, e·h and, of the one down, e·f. The backward pass is widest between the two products, where six
    tensors of a gated MLP's width are there in all, four of a plain one's.

    With experts, each of the k that a token goes to has its own of these, its result before it is weighed (e·h) and, where
    experts learn, its sorted copy of the input (e·h). Where results are weighed, three more of these are there on the way back
    (the gradient, sorted, weighed), which is widest where experts are narrow. A shared expert is a gated MLP of its own width.

    Beside the gradient of a dense MLP's weight one tensor of its width is there; the largest weight of experts is their first
    (gate and up in one), and then the gradients of its two results are all that is left of the inner tensors.
    """
    h, experts = anatomy.hidden_size, anatomy.experts
    gated = anatomy.mlp == "gated"
    inner = NONLINEARITY_KEEPS.get(anatomy.activation, 1) + 1 + gated
    most = 6 if gated else inner + 2
    if experts is None or not anatomy.stacked[block]:
        tensors = inner + (needs_inputs if gated else 0)
        width = anatomy.intermediate_size
        return e * (h * needs_inputs + width * tensors), e * width * (most - tensors), e * width
    k, learns = experts.experts_per_token, any(name in learning for name in anatomy.stacked[block])
    routed = k * (e * (experts.intermediate_size * (inner + learns) + h * (1 + learns)) + ROUTING_BYTES)
    shared = e * experts.shared_intermediate_size * (inner + needs_inputs)
    wide = k * experts.intermediate_size * (most - inner - learns) + experts.shared_intermediate_size * (
        most - inner - needs_inputs
    )
    wide = max(wide, 3 * k * h)
    gone = e * k * (experts.intermediate_size * (inner + learns - 2) + h * learns)
    return e * h * needs_inputs + routed + shared, e * wide, -gone


def _mlp_width(anatomy: ModelAnatomy, block: int) -> int:
    experts = anatomy.experts
    if experts is None or not anatomy.stacked[block]:
        return anatomy.intermediate_size
    return experts.experts_per_token * experts.intermediate_size + experts.shared_intermediate_size


def attends_by_document(anatomy: ModelAnatomy, device: str, *, one_document_per_row: bool) -> bool:
    """Whether the documents of a row are computed one by one (`train.model.attention`) instead of the whole row under a mask.

    On CPUs, for decoders that a fused kernel serves. A row that holds one document and its padding has nothing to keep apart.
    """
    return device == "cpu" and anatomy.kind == "decoder" and anatomy.attention == "fused" and not one_document_per_row
