"""What comes and goes within a step, by phase. Letters as in `plan.memory`; every coefficient in a docstring."""

from __future__ import annotations

from orchestrator.plan.estimates import MemoryTerm
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.memory.shards import Shards
from orchestrator.plan.memory.way import Way
from orchestrator.units import MIB

LOGIT_CHUNK_BYTES = 256 * MIB
"""Logits are computed in chunks that would take at most so many bytes in float32; `train.objective` keeps to it."""

LOGIT_PIECE_BYTES = 8 * MIB
"""Of a chunk at most so much is there in float32 at once; `train.loss` keeps to it. Measured on a CPU core at 4096 and 32000
entries, the loss and its gradient took the same time from 2 to 16 MiB (within 10%) and a quarter to a half more from 64 MiB."""


def phase_terms(footprint: Footprint, way: Way, shards: Shards) -> dict[str, list[MemoryTerm]]:
    """What each phase of a step holds beside what is always there.

    `loss`: every activation, and logits. `backward`: activations, one block on its way back, gradients on theirs. `update`:
    what the optimizer copies, when activations are gone. `one block forward` and `scores`: an evaluation.
    """
    phases = {
        "one block forward": [_forward_term(footprint, way)],
        "scores": [_last_hidden_term(footprint, way, learning=False), _logit_term(footprint, way, learning=False)],
    }
    if not footprint.learning_counts:
        return phases
    kept, sending = _kept_terms(footprint, way), _sending_terms(shards)
    logits = _logit_term(footprint, way, learning=True)
    phases["loss"] = [*kept, *sending, _last_hidden_term(footprint, way, learning=True), logits]
    if footprint.learning_blocks:
        phases["backward"] = [*kept, *sending, *_backward_terms(footprint, way, shards)]
    phases["update"] = [
        MemoryTerm(
            name="update", num_bytes=shards.transient_bytes, reason="what the optimizer copies of gradients and their norm"
        )
    ]
    return phases


def _sending_terms(shards: Shards) -> list[MemoryTerm]:
    if shards.bucket_stays:
        return []
    return [MemoryTerm(name="reduce bucket", num_bytes=shards.bucket_bytes, reason="gradients on their way to other ranks")]


def _kept_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    """What blocks from the cut up keep for the backward pass; with checkpointing their inputs alone, h·e a token.

    The mask of packed documents is boolean, one byte per pair of positions in a row; each block that is whole
    keeps it once more as numbers, or the scores of every head where no fused kernel serves its layout.
    """
    tokens, blocks, e = way.micro_batch_tokens, footprint.learning_blocks, footprint.element_bytes
    shape = f"{way.micro_batch_rows} x {way.row_tokens} tokens"
    pairs = tokens * way.row_tokens
    if not blocks:
        return []
    if way.checkpointing:
        num_bytes, mask = tokens * blocks * footprint.hidden_size * e, pairs
        reason = f"inputs of {blocks} blocks, {shape}"
    else:
        num_bytes, mask = tokens * footprint.kept_token_bytes, pairs * footprint.pair_bytes * blocks
        reason = f"{blocks} blocks from the cut up, {shape}"
    where = "once" if way.checkpointing else f"in {blocks} blocks"
    return [
        MemoryTerm(name="activations", num_bytes=num_bytes, reason=reason),
        MemoryTerm(name="attention mask", num_bytes=mask, reason=f"{way.micro_batch_rows} x {way.row_tokens}² pairs, {where}"),
    ]


def _backward_terms(footprint: Footprint, way: Way, shards: Shards) -> list[MemoryTerm]:
    """One block on its way back: with checkpointing all that it keeps, and its mask; the gradients of its activations, and of
    its input and output, e·2h. The gradients of activations are widest inside the MLP; those of its weights are made, and sent,
    before or after that, and those of attention scores, where no fused kernel makes them, last.
    """
    tokens, e = way.micro_batch_tokens, footprint.element_bytes
    wide = tokens * footprint.working_token_bytes
    weights = shards.in_flight_bytes + tokens * footprint.at_weight_token_bytes
    scores = tokens * (footprint.at_scores_token_bytes + footprint.at_scores_pair_bytes * way.row_tokens)
    working = max(wide, weights, scores) + tokens * 2 * e * footprint.hidden_size
    terms = [MemoryTerm(name="one block back", num_bytes=working, reason="gradients of its activations, and of weights")]
    if way.checkpointing:
        whole = tokens * (footprint.whole_token_bytes + footprint.pair_bytes * way.row_tokens)
        terms.append(MemoryTerm(name="one block again", num_bytes=whole, reason="what it keeps, computed again"))
    return terms


def _last_hidden_term(footprint: Footprint, way: Way, *, learning: bool) -> MemoryTerm:
    """After the last block: its states and those at supervised positions (or, to learn, the latter with their gradient),
    e·2h; and what the final norm keeps, 4h + 4, where a block learns."""
    tokens, h, e = way.micro_batch_tokens, footprint.hidden_size, footprint.element_bytes
    norm = 4 * h + 4 if learning and footprint.learning_blocks else 0
    return MemoryTerm(
        name="last hidden states", num_bytes=tokens * (norm + 2 * e * h), reason="states, and at supervised positions"
    )


def _forward_term(footprint: Footprint, way: Way) -> MemoryTerm:
    """One block's forward pass where nothing is kept, its mask as booleans and as numbers, and the states around it."""
    tokens, e = way.micro_batch_tokens, footprint.element_bytes
    num_bytes = tokens * (
        footprint.forward_token_bytes + 4 * e * footprint.hidden_size + (1 + footprint.pair_bytes) * way.row_tokens
    )
    return MemoryTerm(name="one block", num_bytes=num_bytes, reason="its forward pass, nothing kept")


def _logit_term(footprint: Footprint, way: Way, *, learning: bool) -> MemoryTerm:
    """Logits of the supervised positions, at most all of them, a piece at a time.

    The backward pass of a position costs per vocabulary entry its log-softmax, that one's gradient, and the logit's
    gradient, in float32: 12. Evaluation has the logit (e), its float32 copy (4) and the log-softmax (4). A head that learns
    has its gradient (e·V·h) beside the last of these; with several pieces it waits beside the next one's, and while two of them
    are added up there are three.
    """
    positions = way.micro_batch_rows if footprint.classify else way.micro_batch_tokens
    piece = max(1, min(positions, LOGIT_CHUNK_BYTES // (4 * footprint.logit_width)))
    num_bytes = piece * footprint.logit_width * (12 if learning else 8 + footprint.element_bytes)
    if learning and footprint.head_learns and not footprint.classify:
        gradient, last = footprint.head_bytes, piece * footprint.logit_width * footprint.element_bytes
        num_bytes = max(num_bytes + gradient, 3 * gradient) if piece < positions else max(num_bytes, last + gradient)
    reason = f"{piece} positions x {footprint.logit_width} entries, {'forward and backward' if learning else 'forward'}"
    return MemoryTerm(name="logits", num_bytes=num_bytes, reason=reason)
