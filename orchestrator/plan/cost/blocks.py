"""Operations of the blocks, per token: by formulas for the layouts of the table, as counted on the class for others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from orchestrator.anatomy.costs import Flops, PassFlops
from orchestrator.anatomy.selection import is_attention
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.memory.activations import FUSED_PROJECTIONS
from orchestrator.plan.memory.counted import receives_gradient

BACKWARD_MATMULS, FORWARD_MATMULS = 5, 2
"""Matrix products of a fused attention kernel. Forward: scores, and their product with the values; backward: the scores again,
then the gradients of the scores, values, queries and keys (Dao et al. 2022, FlashAttention, algorithm 4;
`sdpa_backward_flop_count` in torch.utils.flop_counter counts the same). Both are counted for whole rows: a mask saves no
counted operation."""

QUERY_KEY_VALUE = (
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *FUSED_PROJECTIONS,
)
"""Modules whose input is the input of a block's attention: a layout whose projections have other names must add them here."""

ENDING_IN_DROPOUT = ("gpt2", "opt")
"""Decoders that apply dropout of 0.1 to each block's output unless their config says otherwise (transformers' defaults): a
layout that does so too must be added here."""


class BlockFlops(NamedTuple):
    """Operations of some blocks, per token."""

    matrices: float
    """What does not depend on the length of a row."""
    attention: float
    """What is computed for pairs of positions."""


def forward_flops(anatomy: ModelAnatomy, first: int, attended_tokens: float) -> BlockFlops:
    """Return the forward pass of the blocks from `first` up."""
    if anatomy.block_costs:
        return _sum((anatomy.costs_of(block).forward for block in range(first, anatomy.num_blocks)), attended_tokens)
    return BlockFlops(2.0 * block_elements(anatomy, first), _attention(anatomy, first, attended_tokens))


def backward_flops(anatomy: ModelAnatomy, selection: LayerSelection, attended_tokens: float) -> BlockFlops:
    """Return the gradients of activations in the blocks from the cut up."""
    if anatomy.block_costs:
        above = range(selection.cut, anatomy.num_blocks)
        return _sum((_counted(anatomy, selection, block, attended_tokens).backward for block in above), attended_tokens)
    without_gradient, skips_attention = _without_gradient(anatomy, selection)
    attention = _attention(anatomy, selection.cut, attended_tokens)
    skipped = _attention(anatomy, anatomy.num_blocks - 1, attended_tokens) if skips_attention else 0.0
    return BlockFlops(
        2.0 * (block_elements(anatomy, selection.cut) - without_gradient),
        (attention - skipped) * BACKWARD_MATMULS / FORWARD_MATMULS,
    )


def again_flops(anatomy: ModelAnatomy, selection: LayerSelection, attended_tokens: float) -> BlockFlops:
    """Return what checkpointing repeats of the forward pass of the blocks from the cut up, without adapters."""
    above = range(selection.cut, anatomy.num_blocks)
    if anatomy.block_costs:
        return _sum((_counted(anatomy, selection, block, attended_tokens).again for block in above), attended_tokens)
    skipped = sum(_last_matrix(anatomy, selection, block) for block in above)
    attention = _attention(anatomy, selection.cut, attended_tokens)
    return BlockFlops(2.0 * (block_elements(anatomy, selection.cut) - skipped), attention)


def _sum(flops: Iterable[Flops], attended_tokens: float) -> BlockFlops:
    found = list(flops)
    return BlockFlops(sum(each.token for each in found), attended_tokens * sum(each.pair for each in found))


def _counted(anatomy: ModelAnatomy, selection: LayerSelection, block: int, attended_tokens: float) -> PassFlops:
    """Return what the gradients of activations in a block take, as if all of its linear layers were adapted where some are.

    The forward pass is repeated as far as what is saved last, which is behind the last linear layer if that is adapted.
    """
    costs, names = anatomy.costs_of(block), set(anatomy.blocks[block])
    # A policy by score is planned with its cut at 0 while its blocks are unknown: there, everything may have a gradient.
    passing = selection.pending or receives_gradient(anatomy, selection, block)
    found = [costs.passing] if passing else []
    found += [costs.trained] if not names.isdisjoint(selection.trainable) else []
    found += [costs.adapted] if not names.isdisjoint(selection.adapted) else []
    whole = [costs.passing] if costs.adapted in found and anatomy.linears[block][-1] not in selection.adapted else found
    return PassFlops(
        backward=max((each.backward for each in found), key=lambda flops: flops.at(attended_tokens), default=Flops()),
        again=max((each.again for each in whole), key=lambda flops: flops.at(attended_tokens), default=Flops()),
    )


def block_elements(anatomy: ModelAnatomy, first: int) -> float:
    """Return the elements that a token is multiplied with in the blocks from `first` up; of routed experts only its own."""
    return sum(active_elements(anatomy, name) for block in anatomy.blocks[first:] for name in block)


def active_elements(anatomy: ModelAnatomy, name: str) -> float:
    """Return the elements of a block's parameter that one token is multiplied with; none for a norm or a bias."""
    tensor = anatomy.tensors[name]
    if len(tensor.shape) < 2:
        return 0.0
    experts = anatomy.experts
    if experts is None or not any(name in block for block in anatomy.stacked):
        return float(tensor.num_elements)
    return tensor.num_elements * experts.experts_per_token / experts.num_experts


def _last_matrix(anatomy: ModelAnatomy, selection: LayerSelection, block: int) -> int:
    """Return the elements of a block's last matrix if nothing after it keeps anything for backward, so it is not recomputed.

    This is so in decoders whose blocks end in `x + down(...)`; a norm after it, dropout, or a weighted sum of experts keeps
    something. An adapted matrix is recomputed: peft computes it before the adapter, whose inputs backward needs.
    """
    sparse = bool(anatomy.stacked and anatomy.stacked[block])
    # By name: a layout with another name for a norm after the MLP must be added here.
    norm_after = anatomy.kind == "encoder" or any("post_feedforward" in name for name in anatomy.blocks[block])
    if sparse or norm_after or anatomy.model_type in ENDING_IN_DROPOUT:
        return 0
    last = anatomy.linears[block][-1]
    return 0 if last in selection.adapted else anatomy.tensors[last].num_elements


def _without_gradient(anatomy: ModelAnatomy, selection: LayerSelection) -> tuple[int, bool]:
    """Return what has no gradient in the block at the cut, since nothing before it is trained: the elements of the matrices
    whose inputs have none, and whether attention itself has none.

    A block runs through the query, key and value matrices, attention, its output matrix, the first matrices of the MLP and
    its last one. A parallel MLP reads what attention reads: where attention is adapted, the gradient of its input is counted
    although it is not computed, an upper bound.
    """
    names = anatomy.blocks[selection.cut] if selection.cut < anatomy.num_blocks else ()
    linears = anatomy.linears[selection.cut] if names else ()
    # The second-last component of a parameter's name is its module: `model.layers.0.self_attn.q_proj.weight` -> `q_proj`.
    readers = [name for name in linears if name.split(".")[-2] in QUERY_KEY_VALUE]
    # A policy by score is planned with its cut at 0 while its blocks are unknown: there, everything may have a gradient.
    if selection.pending or selection.trains_embeddings or not readers or set(names) & set(selection.trainable):
        return 0, False
    after = [name for name in linears if is_attention(anatomy, name) and name not in readers]
    mlp = [name for name in linears if not is_attention(anatomy, name)]
    adapted, elements = set(selection.adapted), 0
    for stage in (readers, after, mlp[:-1], mlp[-1:]):
        elements += sum(anatomy.tensors[name].num_elements for name in stage)
        if adapted & set(stage):
            break
    return elements, not adapted & set(readers)


def _attention(anatomy: ModelAnatomy, first: int, attended_tokens: float) -> float:
    return 2.0 * FORWARD_MATMULS * attended_tokens * anatomy.num_heads * anatomy.head_dim * (anatomy.num_blocks - first)
