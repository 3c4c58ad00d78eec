"""Memory of routed experts that is neither weights nor activations of one block: adapted copies, and the load-balancing loss."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.estimates import MemoryTerm

BALANCE_BYTES = 12
"""Bytes per token and expert that the load-balancing loss keeps of a block: in float32 the probabilities, which softmax saves, a
copy without padding, and the router's logits."""


@dataclass(frozen=True)
class ExpertFootprint:
    """What the blocks from the cut up keep of their experts, in bytes."""

    copied_bytes: int = 0
    """Adapted copies of all weights, for a class that computes its experts itself."""
    copied_block_bytes: int = 0
    """Those of the block with the most."""
    balance_token_bytes: int = 0
    """What the load-balancing loss keeps, per token."""


NO_EXPERTS = ExpertFootprint()


def expert_footprint(anatomy: ModelAnatomy, selection: LayerSelection, element_bytes: int) -> ExpertFootprint:
    """Return what a selection keeps of the experts of a base."""
    experts = anatomy.experts
    if experts is None or not (selection.trainable or selection.adapted):
        return NO_EXPERTS
    adapted, above = set(selection.adapted), anatomy.stacked[selection.cut :]
    copies = [sum(anatomy.tensors[name].num_elements for name in block if name in adapted) * element_bytes for block in above]
    balance = BALANCE_BYTES * experts.num_experts * sum(map(bool, above)) if experts.balance else 0
    if experts.grouped:
        return ExpertFootprint(balance_token_bytes=balance)
    return ExpertFootprint(sum(copies), max(copies, default=0), balance)


def expert_terms(footprint: ExpertFootprint, num_tokens: int, *, checkpointing: bool) -> list[MemoryTerm]:
    """Return what is kept from the forward to the backward pass: with checkpointing the copies of one block, besides their
    gradients, which exist for one block in any case."""
    terms: list[MemoryTerm] = []
    if footprint.copied_bytes:
        copies = footprint.copied_block_bytes if checkpointing else footprint.copied_bytes
        reason = "experts' weights with their adapters, and the gradients of one block's"
        terms.append(MemoryTerm(name="adapted copies", num_bytes=copies + footprint.copied_block_bytes, reason=reason))
    if footprint.balance_token_bytes:
        reason = "probabilities of every expert, in every block"
        terms.append(MemoryTerm(name="balance", num_bytes=num_tokens * footprint.balance_token_bytes, reason=reason))
    return terms
