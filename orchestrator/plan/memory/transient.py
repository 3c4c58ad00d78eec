"""Transient memory of a step, by phase. Symbols as in `plan.memory.estimate`; every coefficient is derived in a docstring."""

from __future__ import annotations

from orchestrator.plan.estimates import MemoryTerm
from orchestrator.plan.memory.activations import BlockActivations, Peak
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.experts import expert_terms
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.memory.shards import Shards
from orchestrator.units import MIB

LOGIT_CHUNK_BYTES = 256 * MIB
"""Logits are computed in chunks of at most this many bytes in float32; `train.model.objective` uses the same limit."""

LOGIT_PIECE_BYTES = 8 * MIB
"""At most this much of a chunk is in float32 at once; `train/model/loss.py` uses the same limit. Measured on a CPU core at
4096 and 32000 entries: the loss and its gradient take the same time from 2 to 16 MiB (within 10%), and 25% to 50% more from 64
MiB."""


def phase_terms(footprint: Footprint, candidate: Candidate, shards: Shards) -> dict[str, list[MemoryTerm]]:
    """Return the transient memory of each phase of a step.

    `loss`: every activation, and logits. `backward`: activations, and the gradients of one block. `update`: the optimizer's
    copies, after activations are freed. `one block forward` and `scores`: an evaluation.
    """
    phases = {
        "one block forward": [_forward_term(footprint, candidate)],
        "scores": [_last_hidden_term(footprint, candidate, learning=False), _logit_term(footprint, candidate, learning=False)],
    }
    # The control `none` is only evaluated.
    if not footprint.learning_counts:
        return phases
    kept, sending = _kept_terms(footprint, candidate), _sending_terms(shards)
    logits = _logit_term(footprint, candidate, learning=True)
    phases["loss"] = [*kept, *sending, _last_hidden_term(footprint, candidate, learning=True), logits]
    if footprint.learning_blocks:
        phases["backward"] = [*kept, *sending, *_backward_terms(footprint, candidate, shards)]
    phases["update"] = [
        MemoryTerm(name="update", num_bytes=shards.transient_bytes, reason="the optimizer's copies of gradients, and their norm")
    ]
    return phases


def _sending_terms(shards: Shards) -> list[MemoryTerm]:
    if shards.bucket_stays:
        return []
    return [MemoryTerm(name="reduce bucket", num_bytes=shards.bucket_bytes, reason="gradient communication buffers")]


def _kept_terms(footprint: Footprint, candidate: Candidate) -> list[MemoryTerm]:
    """Return what blocks from the cut up keep for the backward pass; with checkpointing only their inputs, h·e per token.

    The mask of packed documents is boolean, one byte per pair of positions in a row; each block that is not checkpointed keeps
    it once more as numbers, or keeps the scores of every head if no fused kernel supports its layout. On a CPU documents are
    computed one by one (`train.model.attention`), without a mask.
    """
    tokens, blocks, e = candidate.micro_batch_tokens, footprint.learning_blocks, footprint.element_bytes
    shape = f"{candidate.micro_batch_rows} x {candidate.row_tokens} tokens"
    pairs = 0 if _attends_by_document(footprint, candidate) else tokens * candidate.row_tokens
    if not blocks:
        return []
    if candidate.checkpointing:
        num_bytes, mask = tokens * blocks * footprint.hidden_size * e, pairs
        reason = f"inputs of {blocks} blocks, {shape}"
    else:
        num_bytes = tokens * _kept_token_bytes(footprint, candidate) + candidate.micro_batch_rows * footprint.kept_row_bytes
        mask = pairs * footprint.kept_pair_bytes
        reason = f"{blocks} blocks from the cut up, {shape}"
    where = "once" if candidate.checkpointing else f"in {blocks} blocks"
    terms = [MemoryTerm(name="activations", num_bytes=num_bytes, reason=reason)]
    if mask:
        reason = f"{candidate.micro_batch_rows} x {candidate.row_tokens}² pairs, {where}"
        terms.append(MemoryTerm(name="attention mask", num_bytes=mask, reason=reason))
    return terms + expert_terms(footprint.experts, tokens, checkpointing=candidate.checkpointing)


def _backward_terms(footprint: Footprint, candidate: Candidate, shards: Shards) -> list[MemoryTerm]:
    """Return the memory of one block's backward pass: with checkpointing everything that it keeps, and its mask; the gradients
    of its activations, and of its input and output, e·2h. The gradients of activations peak inside the MLP; those of its
    weights are computed and sent before or after that, and those of attention scores, without a fused kernel, last."""
    tokens = candidate.micro_batch_tokens
    pairs = 0 if _attends_by_document(footprint, candidate) else candidate.row_tokens
    ends = tokens * 2 * footprint.element_bytes * footprint.hidden_size

    def sizes(block: BlockActivations) -> tuple[int, int]:
        """Return (recomputed, at the peak besides that)."""
        own = Peak(block.kept_bytes, block.kept_pair_bytes, block.kept_row_bytes)
        kept = _peak_bytes(own, candidate, pairs) if candidate.checkpointing else 0
        peaks = (_peak_bytes(peak, candidate, pairs) + (shards.in_flight_bytes if peak.at_weight else 0) for peak in block.peaks)
        return kept, max(peaks) + ends

    recomputed, working = max((sizes(block) for block in footprint.backward_blocks), key=sum)
    terms = [MemoryTerm(name="one block back", num_bytes=working, reason="gradients of its activations, and of weights")]
    if candidate.checkpointing:
        terms.append(MemoryTerm(name="one block recomputed", num_bytes=recomputed, reason="its activations, recomputed"))
    return terms


def _peak_bytes(peak: Peak, candidate: Candidate, pairs: int) -> int:
    """Return a peak for a micro-batch whose tokens each have so many pairs."""
    return candidate.micro_batch_rows * peak.row_bytes + candidate.micro_batch_tokens * (
        peak.token_bytes + peak.pair_bytes * pairs
    )


def _last_hidden_term(footprint: Footprint, candidate: Candidate, *, learning: bool) -> MemoryTerm:
    """Return the memory after the last block: its output and that at supervised positions (when training, the latter and its
    gradient), e·2h; and what the final norm keeps, 4h + 4, if a block is trained."""
    tokens, h, e = candidate.micro_batch_tokens, footprint.hidden_size, footprint.element_bytes
    norm = 4 * h + 4 if learning and footprint.learning_blocks else 0
    return MemoryTerm(
        name="last hidden states", num_bytes=tokens * (norm + 2 * e * h), reason="states, and at supervised positions"
    )


def _forward_term(footprint: Footprint, candidate: Candidate) -> MemoryTerm:
    """Return one block's forward pass if nothing is kept: its mask as booleans and as numbers, and its input and output."""
    tokens, e = candidate.micro_batch_tokens, footprint.element_bytes
    pairs = 0 if _attends_by_document(footprint, candidate) else candidate.row_tokens
    peak = max(_peak_bytes(peak, candidate, pairs) for peak in footprint.forward_peaks)
    num_bytes = peak + tokens * (pairs + 4 * e * footprint.hidden_size)
    return MemoryTerm(name="one block", num_bytes=num_bytes, reason="forward pass, nothing kept")


def _logit_term(footprint: Footprint, candidate: Candidate, *, learning: bool) -> MemoryTerm:
    """Return the logits of the supervised positions, at most all of them, chunk by chunk.

    A chunk takes e per vocabulary entry, and a piece of it 8: its float32 copy and its log-softmax, which becomes the gradient
    that is written back into the chunk (`train/model/loss.py`). A trainable head also has its gradient (e·V·h), which exists
    twice while it is scaled; with several chunks it is summed in float32 (4·V·h), besides the next chunk's.

    A head with an adapter or a partitioned head, and a classifier, use torch's own cross entropy instead: 12 per entry, for
    the log-softmax, its gradient and the logits' gradient in float32.
    """
    if footprint.own_logits:
        return _own_logit_term(footprint, candidate, learning=learning)
    positions = candidate.micro_batch_rows if footprint.one_target_per_row else candidate.micro_batch_tokens
    chunk = max(1, min(positions, LOGIT_CHUNK_BYTES // (4 * footprint.logit_width)))
    piece = max(1, min(chunk, LOGIT_PIECE_BYTES // (4 * footprint.logit_width)))
    e, entries = footprint.element_bytes, chunk * footprint.logit_width
    in_float32 = 8 * piece * footprint.logit_width
    gradient = footprint.head_bytes if footprint.head_learns and not footprint.one_target_per_row else 0
    if not learning:
        num_bytes = entries * (8 + e) if footprint.one_target_per_row else e * entries + in_float32
    elif _head_is_plain(footprint, candidate):
        # The gradients of several chunks are summed in float32: rounding each sum to bfloat16 would lose digits.
        summed = gradient * 4 // e
        several = e * entries + summed + max(gradient, in_float32)
        num_bytes = several if chunk < positions else max(e * entries + max(gradient, in_float32), 2 * gradient)
    else:
        num_bytes = 12 * entries
        if gradient:
            num_bytes = max(num_bytes + gradient, 3 * gradient) if chunk < positions else max(num_bytes, e * entries + gradient)
    reason = f"{chunk} positions x {footprint.logit_width} entries, {'forward and backward' if learning else 'forward'}"
    return MemoryTerm(name="logits", num_bytes=num_bytes, reason=reason)


def _own_logit_term(footprint: Footprint, candidate: Candidate, *, learning: bool) -> MemoryTerm:
    """Return the logits that a class computes itself, at every position at once: what its head returns and what it makes of that,
    2e per entry; and of the supervised ones, at most all, a copy and its gradient, 2e, and in float32 the values, their
    log-softmax and its gradient, 12. A trainable head has its gradient besides, e·V·h. Scoring works in pieces."""
    entries, e = candidate.micro_batch_tokens * footprint.logit_width, footprint.element_bytes
    gradient = footprint.head_bytes if footprint.head_learns else 0
    num_bytes = entries * (4 * e + 12) + gradient if learning else 3 * e * entries + LOGIT_PIECE_BYTES * 2
    reason = f"all {candidate.micro_batch_tokens} positions x {footprint.logit_width} entries, by the class itself"
    return MemoryTerm(name="logits", num_bytes=num_bytes, reason=reason)


def _head_is_plain(footprint: Footprint, candidate: Candidate) -> bool:
    """Return what `train.model.loss.is_plain` would: the head is one whole matrix that computes its gradient together with the
    loss."""
    partitioned = candidate.executor == "deepspeed" and candidate.zero_stage == 3
    return not (footprint.one_target_per_row or footprint.head_adapted or partitioned)


def _attends_by_document(footprint: Footprint, candidate: Candidate) -> bool:
    return candidate.device == "cpu" and footprint.by_document_on_cpu


def _kept_token_bytes(footprint: Footprint, candidate: Candidate) -> int:
    """Return the bytes per token of all trainable blocks."""
    return footprint.kept_token_bytes + (footprint.by_document_token_bytes if _attends_by_document(footprint, candidate) else 0)
