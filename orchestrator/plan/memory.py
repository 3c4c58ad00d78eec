"""Memory of one rank, term by term. Every coefficient stands in a docstring with its source.

Bytes throughout. T is the tokens of a micro-batch (rows x row width), W the ranks of a gang, P the elements
that learn, and "element" the size of a number in the compute dtype (2 for bfloat16, 4 for float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.plan.footprint import Footprint
from orchestrator.plan.values import MemoryEstimate, MemoryTerm
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


def estimate(footprint: Footprint, way: Way) -> tuple[MemoryEstimate, int]:
    """(memory of a rank on its device, bytes that it puts into host memory).

    Host memory takes what is offloaded. A 16-bit base is loaded there before ZeRO-3 partitions it: mapped from its files
    (measured: no anonymous memory) or, where they hold another dtype, as a copy.
    """
    terms = [
        *_weight_terms(footprint, way),
        *_state_terms(footprint, way),
        *_activation_terms(footprint, way),
        *_logit_terms(footprint, way),
        *_runtime_terms(way),
    ]
    if footprint.quantized and way.zero_stage == 3:
        terms.append(_loading_term(footprint, sum(term.num_bytes for term in terms)))
    used = sum(term.num_bytes for term in terms)
    terms.append(
        MemoryTerm(name="allocator slack", num_bytes=round(SLACK_SHARE * used), reason=f"{SLACK_SHARE:.0%} of the above")
    )
    host_bytes = _offloaded_bytes(footprint, way)
    if way.device == "cpu" and host_bytes:
        terms.append(MemoryTerm(name="offloaded", num_bytes=host_bytes, reason="offloading stays in the same memory on a CPU"))
    if way.zero_stage == 3 and not footprint.quantized:
        host_bytes = max(host_bytes, footprint.converted_bytes)
    return MemoryEstimate(terms=tuple(term for term in terms if term.num_bytes)), host_bytes


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

    An element that learns costs its weight and its gradient in the compute dtype, a float32 gradient sum over the
    rounds of a step (4), a float32 master (4) and Adam's two moments (8); stage 1 partitions masters, moments and
    the float32 sums, stage 2 also gradients, stage 3 also weights (ZeRO, section 5, with the float32 sum added).
    """
    elements, size = footprint.trainable_elements, footprint.element_bytes
    return {
        "learning weights": _share(elements * size, way, 3),
        "gradients": _share(elements * size, way, 2),
        "gradient sums": _share(elements * 4, way, 1),
        "masters and Adam": _share(elements * 12, way, 1),
    }


def _offloaded(way: Way) -> tuple[str, ...]:
    return {
        "none": (),
        "optimizer": ("gradient sums", "masters and Adam"),
        "parameters": ("learning weights", "gradient sums", "masters and Adam"),
    }[way.offload]


def _offloaded_bytes(footprint: Footprint, way: Way) -> int:
    state = _state_bytes(footprint, way)
    frozen = _share(footprint.frozen_bytes, way, 3) if way.offload == "parameters" else 0
    return frozen + sum(state[name] for name in _offloaded(way))


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


def _activation_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    """What the backward pass needs, from the cut up; below it one block's working set comes and goes.

    With checkpointing a block keeps its input (one element per hidden unit) and one block at a time is whole.
    The mask of packed documents is boolean, one byte per pair of positions in a row, and each block that is whole
    keeps it once more as numbers.
    """
    tokens, blocks = way.micro_batch_tokens, footprint.learning_blocks
    block = tokens * footprint.block_token_bytes
    entry = tokens * footprint.hidden_size * footprint.element_bytes
    whole = 1 if way.checkpointing else max(1, blocks)
    mask = tokens * way.row_tokens * (1 + footprint.element_bytes * whole)
    shape = f"{way.micro_batch_rows} x {way.row_tokens} tokens"
    if not blocks:
        kept, reason = block + entry, f"one block's working set, {shape}; nothing is kept"
    elif way.checkpointing:
        kept, reason = blocks * entry + block, f"inputs of {blocks} blocks and one block whole, {shape}"
    else:
        kept, reason = blocks * block + entry, f"{blocks} blocks from the cut up, {shape}"
    pairs = f"{way.micro_batch_rows} x {way.row_tokens}² pairs, in {whole} block{'s' if whole > 1 else ''}"
    return [
        MemoryTerm(name="activations", num_bytes=kept, reason=reason),
        MemoryTerm(name="attention mask", num_bytes=mask, reason=pairs),
    ]


def _logit_terms(footprint: Footprint, way: Way) -> list[MemoryTerm]:
    """Logits of the supervised positions, at most all of them, a piece at a time.

    A position costs per vocabulary entry: the logit in the compute dtype, its float32 copy (4), the log-softmax (4),
    that one's gradient (4), and the logit's gradient in the compute dtype. Evaluation keeps no gradient and costs less.
    """
    positions = way.micro_batch_rows if footprint.classify else way.micro_batch_tokens
    piece = max(1, min(positions, LOGIT_CHUNK_BYTES // (4 * footprint.logit_width)))
    num_bytes = piece * footprint.logit_width * (12 + 2 * footprint.element_bytes)
    return [
        MemoryTerm(
            name="logits",
            num_bytes=num_bytes,
            reason=f"{piece} positions x {footprint.logit_width} entries, forward and backward",
        )
    ]


def _runtime_terms(way: Way) -> list[MemoryTerm]:
    what = "CUDA context and libraries" if way.device == "cuda" else "interpreter and libraries"
    terms = [MemoryTerm(name="runtime", num_bytes=RUNTIME_BYTES[way.device], reason=what)]
    if way.ranks > 1:
        backend = "nccl" if way.device == "cuda" else "gloo"
        terms.append(MemoryTerm(name="collectives", num_bytes=COLLECTIVES_BYTES[backend], reason=f"{backend} buffers"))
    return terms


def _loading_term(footprint: Footprint, steady_bytes: int) -> MemoryTerm:
    """Each rank loads a quantized model whole before it is partitioned (huggingface/peft#1844)."""
    whole = footprint.frozen_bytes + footprint.restore_bytes
    return MemoryTerm(
        name="loading", num_bytes=max(0, whole - steady_bytes), reason="the whole quantized base, before it is partitioned"
    )
