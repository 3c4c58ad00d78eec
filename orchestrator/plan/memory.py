"""Memory of one rank, term by term. Every coefficient stands in a docstring with its source.

Bytes throughout. T is the tokens of a micro-batch (rows x row width), W the ranks of a gang, P the elements
that learn, V the vocabulary, h the hidden size, and e the size of a number in the compute dtype (2 for bfloat16,
4 for float32).

Some of it is held all the time; the rest comes and goes. What a rank needs is the most that any phase of a step
holds: the loss (every activation, and logits), the backward pass (activations, and one block's gradients), the update,
the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from orchestrator.plan.footprint import Footprint
from orchestrator.plan.values import MemoryEstimate, MemoryPhase, MemoryTerm
from orchestrator.units import GIB, MIB, format_count

LOGIT_CHUNK_BYTES = 256 * MIB
"""Logits (float32) are computed in pieces of at most so many bytes; `train.objective` keeps to it."""
REDUCE_BUCKET_ELEMENTS = 2**22
"""Gradients that DeepSpeed collects before it reduces them, at most; `train.deepspeed_engine` gives it the figure. What
learns is small, and a new engine per trial would pay for big buckets."""
RUNTIME_BYTES = {"cuda": GIB, "cpu": GIB // 2}
"""CUDA context with its libraries (0.5 to 1 GiB by GPU and version); on a CPU the interpreter with torch,
transformers, peft and deepspeed imported (0.41 GiB measured)."""
COLLECTIVES_BYTES = {"nccl": GIB // 2, "gloo": 32 * MIB}
"""Buffers of a process group."""
RESIDENT_SHARE = 0.7
"""A whole model that needs more of a device's free memory than this is not put there: to verify and to score a bundle
takes one forward pass at a time beside it. `serve.check_process`, which imports nothing of ours, has the same figure."""
SLACK_SHARE = 0.05
"""What an allocator loses to rounding and fragmentation; assumed."""

Offload = Literal["none", "optimizer", "parameters"]
Device = Literal["cpu", "cuda"]
Stage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Way:
    """One way to run a gang: all that a rank's memory depends on besides the model."""

    device: Device
    ranks: int
    executor: Literal["torch", "deepspeed"]
    zero_stage: Stage
    offload: Offload
    checkpointing: bool
    row_tokens: int
    micro_batch_rows: int = 1

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_rows * self.row_tokens

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        parts = [ranks] if self.executor == "torch" else [ranks, f"ZeRO-{self.zero_stage}"]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [f"{self.offload} offloaded"] if self.offload != "none" else []
        return ", ".join(parts)


class RankMemory(NamedTuple):
    """What one rank needs."""

    device: MemoryEstimate
    """Of its GPU; without one, of its part of the host's memory."""
    host: MemoryEstimate
    """Of the host, beside a GPU."""
    first_rank_bytes: int
    """Of the host, on the gang's first rank alone: what learns, gathered there to be saved."""


def estimate(footprint: Footprint, way: Way) -> RankMemory:
    """The memory of one rank, on its device and on its host."""
    host = _host_terms(footprint, way)
    steady = [*_weight_terms(footprint, way), *_state_terms(footprint, way)]
    phases = _phases(footprint, way)
    if way.device == "cpu":
        offloaded, passing = (term.model_copy(update={"name": f"host: {term.name}"}) for term in host)
        steady.append(offloaded)
        phases["saving"] = [passing]
    if footprint.quantized and way.zero_stage == 3:
        phases["loading"] = [_loading_term(footprint, sum(term.num_bytes for term in steady))]
    sizes = {name: sum(term.num_bytes for term in terms) for name, terms in phases.items()}
    ordered = sorted(sizes, key=lambda name: -sizes[name])
    held = sum(term.num_bytes for term in steady)
    used = held + sizes[ordered[0]]
    slack = MemoryTerm(
        name="allocator slack", num_bytes=round(SLACK_SHARE * used), reason=f"{SLACK_SHARE:.0%} of the above", outside=True
    )
    moving = [term.model_copy(update={"moving": True}) for term in phases[ordered[0]]]
    terms = (*steady, *moving, slack, *_runtime_terms(way))
    return RankMemory(
        device=MemoryEstimate(
            terms=tuple(term for term in terms if term.num_bytes),
            phases=tuple(MemoryPhase(name=name, num_bytes=held + sizes[name]) for name in ordered),
        ),
        host=MemoryEstimate(terms=tuple(term for term in host if term.num_bytes)),
        first_rank_bytes=footprint.trainable_elements * footprint.element_bytes,
    )


def _share(num_bytes: int, way: Way, from_stage: int) -> int:
    """A rank's part of what is partitioned from a ZeRO stage on (Rajbhandari et al. 2020, figure 1)."""
    return -(-num_bytes // way.ranks) if way.zero_stage >= from_stage else num_bytes


def _weight_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    away = way.offload == "parameters"
    held = "offloaded" if away else f"1/{way.ranks} of them" if way.zero_stage == 3 and way.ranks > 1 else "whole on every rank"
    dtype = "nf4 matrices, the rest 16 bit" if footprint.quantized else f"{8 * footprint.element_bytes} bit"
    terms = [
        MemoryTerm(
            name="frozen weights",
            num_bytes=0 if away else _share(footprint.frozen_bytes, way, 3),
            reason=f"{dtype}, {held}",
        ),
        MemoryTerm(
            name="copy to restore",
            num_bytes=_share(footprint.restore_bytes, way, 3),
            reason="unfrozen weights as the base has them, for the next trial",
        ),
    ]
    if way.zero_stage == 3:
        gathered = 2 * footprint.largest_block_bytes + footprint.head_bytes
        terms.append(MemoryTerm(name="gathered weights", num_bytes=gathered, reason="a block, the next one, and the head"))
    if footprint.quantized:
        opened = footprint.largest_linear_elements * footprint.element_bytes
        terms.append(MemoryTerm(name="dequantized matrix", num_bytes=opened, reason="the largest one while it multiplies"))
    return terms


def _state_bytes(footprint: Footprint, way: Way) -> dict[str, int]:
    """Bytes that what learns takes, by part, for one rank, before offloading.

    An element that learns costs its weight in the compute dtype, a float32 gradient sum over the rounds of a step (4), a
    float32 master (4) and Adam's two moments (8); with DeepSpeed also its gradient in the compute dtype, which the torch
    engine adds to its sum tensor by tensor. Stage 1 partitions masters, moments and the float32 sums, stage 2 also
    gradients, stage 3 also weights (ZeRO, section 5, with the float32 sum added).
    """
    elements, size = footprint.trainable_elements, footprint.element_bytes
    return {
        "learning weights": _share(elements * size, way, 3),
        "gradients": _share(elements * size, way, 2) if way.executor == "deepspeed" else 0,
        "gradient sums": _share(elements * 4, way, 1),
        "masters and Adam": _share(elements * 12, way, 1),
    }


def _offloaded(way: Way) -> tuple[str, ...]:
    return {
        "none": (),
        "optimizer": ("gradient sums", "masters and Adam"),
        "parameters": ("learning weights", "gradient sums", "masters and Adam"),
    }[way.offload]


def _host_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    """What a rank puts into host memory.

    What is offloaded, all the time. Its part of a checkpoint's masters and moments on their way to the disk. A 16-bit base that ZeRO-3 partitions is loaded there before: mapped from its files (measured: no anonymous
    memory) or, where they hold another dtype, as a copy; a quantized one is made on the device, matrix by matrix.
    """
    state = _state_bytes(footprint, way)
    frozen = _share(footprint.frozen_bytes, way, 3) if way.offload == "parameters" else 0
    offloaded = frozen + sum(state[name] for name in _offloaded(way))
    copied = footprint.converted_bytes if way.zero_stage == 3 and not footprint.quantized else 0
    return [
        MemoryTerm(name="offloaded", num_bytes=offloaded, reason=f"{way.offload}, pinned"),
        MemoryTerm(
            name="loading or saving",
            num_bytes=max(copied - offloaded, state["masters and Adam"]),
            reason="the larger of the base in the compute dtype, where its files hold another, and a checkpoint on its way",
        ),
    ]


def _state_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    count, size = format_count(footprint.trainable_elements), footprint.element_bytes
    why = {
        "learning weights": f"{count} elements x {size} bytes",
        "gradients": f"{count} elements x {size} bytes",
        "gradient sums": f"{count} elements x 4 bytes",
        "masters and Adam": f"{count} elements x 12 bytes",
    }
    stages = {"learning weights": 3, "gradients": 2, "gradient sums": 1, "masters and Adam": 1}
    terms: list[MemoryTerm] = []
    for name, num_bytes in _state_bytes(footprint, way).items():
        if name in _offloaded(way):
            continue
        split = f" / {way.ranks} ranks" if way.zero_stage >= stages[name] and way.ranks > 1 else ""
        terms.append(MemoryTerm(name=name, num_bytes=num_bytes, reason=why[name] + split))
    if way.executor == "deepspeed" and way.ranks > 1:
        bucket = min(footprint.trainable_elements, REDUCE_BUCKET_ELEMENTS) * size
        terms.append(MemoryTerm(name="reduce bucket", num_bytes=bucket, reason="gradients on their way to other ranks"))
    return terms


def _phases(footprint: Footprint, way: Way) -> dict[str, list[MemoryTerm]]:
    """What comes and goes, by phase of a step."""
    phases = {
        "one block forward": [_forward_term(footprint, way)],
        "scores": [_last_hidden_term(footprint, way, learning=False), _logit_term(footprint, way, learning=False)],
    }
    if not footprint.trainable_elements:
        return phases
    kept, logits = _kept_terms(footprint, way), _logit_term(footprint, way, learning=True)
    phases["loss"] = [*kept, _last_hidden_term(footprint, way, learning=True), logits]
    if footprint.learning_blocks:
        phases["backward"] = [*kept, *_backward_terms(footprint, way)]
    return phases


def _kept_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    """What blocks from the cut up keep for the backward pass; with checkpointing their inputs alone, h·e a token.

    The mask of packed documents is boolean, one byte per pair of positions in a row; each block that is whole
    keeps it once more as numbers, e bytes a pair.
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
        num_bytes, mask = tokens * footprint.kept_token_bytes, pairs * e * blocks
        reason = f"{blocks} blocks from the cut up, {shape}"
    where = "once" if way.checkpointing else f"in {blocks} blocks"
    return [
        MemoryTerm(name="activations", num_bytes=num_bytes, reason=reason),
        MemoryTerm(name="attention mask", num_bytes=mask, reason=f"{way.micro_batch_rows} x {way.row_tokens}² pairs, {where}"),
    ]


def _backward_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    """One block on its way back: with checkpointing all that it keeps, and its mask; the gradients of its activations, and of
    its input and output, e·2h. While a weight's own gradient is made, half of the former are there.
    """
    tokens, e = way.micro_batch_tokens, footprint.element_bytes
    wide, weight = tokens * footprint.working_token_bytes, e * footprint.largest_learning_elements
    working = max(wide, wide // 2 + weight) + tokens * 2 * e * footprint.hidden_size
    terms = [MemoryTerm(name="one block back", num_bytes=working, reason="gradients of its activations, or of a weight")]
    if way.checkpointing:
        whole = tokens * footprint.whole_token_bytes + e * tokens * way.row_tokens
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
    num_bytes = tokens * (footprint.forward_token_bytes + 4 * e * footprint.hidden_size + (1 + e) * way.row_tokens)
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


def _runtime_terms(way: Way) -> Sequence[MemoryTerm]:
    what = "CUDA context and libraries" if way.device == "cuda" else "interpreter and libraries"
    terms = [MemoryTerm(name="runtime", num_bytes=RUNTIME_BYTES[way.device], reason=what, outside=True)]
    if way.ranks > 1:
        backend = "nccl" if way.device == "cuda" else "gloo"
        reason = f"{backend} buffers"
        terms.append(MemoryTerm(name="collectives", num_bytes=COLLECTIVES_BYTES[backend], reason=reason, outside=True))
    return terms


def _loading_term(footprint: Footprint, steady_bytes: int) -> MemoryTerm:
    """Each rank loads a quantized model whole before it is partitioned (huggingface/peft#1844)."""
    whole = footprint.frozen_bytes + footprint.restore_bytes
    return MemoryTerm(
        name="loading", num_bytes=max(0, whole - steady_bytes), reason="the whole quantized base, before it is partitioned"
    )
