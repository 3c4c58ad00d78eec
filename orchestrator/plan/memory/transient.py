"""What comes and goes within a step, by phase. Letters as in `plan.memory`; every coefficient in a docstring."""

from __future__ import annotations

from orchestrator.plan.estimates import MemoryTerm
from orchestrator.plan.memory.candidate import Way
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.memory.shards import Shards
from orchestrator.units import MIB

LOGIT_CHUNK_BYTES = 256 * MIB
"""Logits are computed in chunks that would take at most so many bytes in float32; `train.model.objective` keeps to it."""

LOGIT_PIECE_BYTES = 8 * MIB
"""Of a chunk at most so much is in float32 at once; `train/model/loss.py` keeps to it. Measured on a CPU core at 4096 and 32000
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
        MemoryTerm(name="update", num_bytes=shards.transient_bytes, reason="the optimizer's copies of gradients, and their norm")
    ]
    return phases


def _sending_terms(shards: Shards) -> list[MemoryTerm]:
    if shards.bucket_stays:
        return []
    return [MemoryTerm(name="reduce bucket", num_bytes=shards.bucket_bytes, reason="gradient communication buffers")]


def _kept_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    """What blocks from the cut up keep for the backward pass; with checkpointing their inputs alone, h·e a token.

    The mask of packed documents is boolean, one byte per pair of positions in a row; each block that is whole
    keeps it once more as numbers, or the scores of every head where no fused kernel serves its layout. On a CPU documents are
    computed apart (`train.model.attention`), without a mask.
    """
    tokens, blocks, e = way.micro_batch_tokens, footprint.learning_blocks, footprint.element_bytes
    shape = f"{way.micro_batch_rows} x {way.row_tokens} tokens"
    pairs = 0 if _attends_by_document(footprint, way) else tokens * way.row_tokens
    if not blocks:
        return []
    if way.checkpointing:
        num_bytes, mask = tokens * blocks * footprint.hidden_size * e, pairs
        reason = f"inputs of {blocks} blocks, {shape}"
    else:
        num_bytes, mask = tokens * _kept_token_bytes(footprint, way), pairs * footprint.pair_bytes * blocks
        reason = f"{blocks} blocks from the cut up, {shape}"
    where = "once" if way.checkpointing else f"in {blocks} blocks"
    terms = [MemoryTerm(name="activations", num_bytes=num_bytes, reason=reason)]
    if mask:
        reason = f"{way.micro_batch_rows} x {way.row_tokens}² pairs, {where}"
        terms.append(MemoryTerm(name="attention mask", num_bytes=mask, reason=reason))
    return terms


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
        whole = tokens * (footprint.whole_token_bytes + _pair_bytes(footprint, way) * way.row_tokens)
        terms.append(MemoryTerm(name="one block recomputed", num_bytes=whole, reason="its activations, recomputed"))
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
    pairs = 0 if _attends_by_document(footprint, way) else 1
    num_bytes = tokens * (
        footprint.forward_token_bytes + 4 * e * footprint.hidden_size + (pairs + _pair_bytes(footprint, way)) * way.row_tokens
    )
    return MemoryTerm(name="one block", num_bytes=num_bytes, reason="forward pass, nothing kept")


def _logit_term(footprint: Footprint, way: Way, *, learning: bool) -> MemoryTerm:
    """Logits of the supervised positions, at most all of them, a chunk at a time.

    A chunk takes e a vocabulary entry, and a piece of it 8, its float32 copy and its log-softmax, which becomes the gradient
    that goes back into the chunk (`train/model/loss.py`). A trainable head has its gradient (e·V·h) too, which is there twice
    when it is scaled; with several chunks it is summed in float32 (4·V·h), beside the next one's.

    A head with an adapter or in parts, and a classifier, goes through torch's own cross entropy instead: 12, for the
    log-softmax, that one's gradient, and the logit's gradient, in float32.
    """
    positions = way.micro_batch_rows if footprint.one_target_per_row else way.micro_batch_tokens
    chunk = max(1, min(positions, LOGIT_CHUNK_BYTES // (4 * footprint.logit_width)))
    piece = max(1, min(chunk, LOGIT_PIECE_BYTES // (4 * footprint.logit_width)))
    e, entries = footprint.element_bytes, chunk * footprint.logit_width
    in_float32 = 8 * piece * footprint.logit_width
    gradient = footprint.head_bytes if footprint.head_learns and not footprint.one_target_per_row else 0
    if not learning:
        num_bytes = entries * (8 + e) if footprint.one_target_per_row else e * entries + in_float32
    elif _head_is_plain(footprint, way):
        summed = gradient * 4 // e
        several = e * entries + summed + max(gradient, in_float32)
        num_bytes = several if chunk < positions else max(e * entries + max(gradient, in_float32), 2 * gradient)
    else:
        num_bytes = 12 * entries
        if gradient:
            num_bytes = max(num_bytes + gradient, 3 * gradient) if chunk < positions else max(num_bytes, e * entries + gradient)
    reason = f"{chunk} positions x {footprint.logit_width} entries, {'forward and backward' if learning else 'forward'}"
    return MemoryTerm(name="logits", num_bytes=num_bytes, reason=reason)


def _head_is_plain(footprint: Footprint, way: Way) -> bool:
    """As `train.model.loss.is_plain` finds it: one whole matrix, that makes its gradient with its loss."""
    partitioned = way.executor == "deepspeed" and way.zero_stage == 3
    return not (footprint.one_target_per_row or footprint.head_adapted or partitioned)


def _attends_by_document(footprint: Footprint, way: Way) -> bool:
    return way.device == "cpu" and footprint.by_document_on_cpu


def _kept_token_bytes(footprint: Footprint, way: Way) -> int:
    """Of all blocks that learn, per token."""
    return footprint.kept_token_bytes + (footprint.by_document_token_bytes if _attends_by_document(footprint, way) else 0)


def _pair_bytes(footprint: Footprint, way: Way) -> int:
    """Of one block, per token and position of its row; documents that are computed apart have no mask."""
    return 0 if _attends_by_document(footprint, way) else footprint.pair_bytes
