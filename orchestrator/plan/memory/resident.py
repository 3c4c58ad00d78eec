"""What a rank holds all the time: weights, what learns, and what lies in host memory. Letters as in `plan.memory`."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from orchestrator.plan.estimates import MemoryTerm
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.memory.shards import RankShards, Shards, rank_shards
from orchestrator.units import format_count

REDUCE_BUCKET_ELEMENTS = 2**22
"""Gradients that DeepSpeed collects before it reduces them, at most; `train.engines.deepspeed_engine` gives it the figure. What
learns is small, and a new engine per trial would pay for big buckets."""


def shards_of(footprint: Footprint, candidate: Candidate) -> RankShards:
    """What the rank that holds most has of the numbers that learn, to the byte: see `plan.memory.shards`."""
    return _shards(
        footprint.learning_counts,
        footprint.element_bytes,
        replace(candidate, checkpointing=False, row_tokens=1, micro_batch_rows=1),
    )


@lru_cache(maxsize=4096)
def _shards(counts: tuple[int, ...], element_bytes: int, candidate: Candidate) -> RankShards:
    """Kept, since a ladder asks for it at every micro-batch; rows do not matter to it."""
    return rank_shards(
        counts,
        ranks=candidate.ranks,
        zero_stage=candidate.zero_stage,
        dtype="bfloat16" if element_bytes == 2 else "float32",
        executor=candidate.executor,
        bucket_elements=REDUCE_BUCKET_ELEMENTS,
        offload=candidate.offload,
    )


def weight_terms(footprint: Footprint, candidate: Candidate) -> list[MemoryTerm]:
    """Weights that do not learn, and what is opened of them at a time.

    Stage 3 gathers a module's weights for as long as it computes, and `stage3_max_reuse_distance: 0` lets none wait: a block
    and what is fetched ahead of it are less than two blocks, beside the head. Of quantized matrices it partitions the packed
    numbers alone; their statistics are whole on every rank.
    """
    parted = candidate.zero_stage == 3
    away = candidate.offload == "parameters"
    held = "offloaded" if away else f"1/{candidate.ranks} of them" if parted and candidate.ranks > 1 else "whole on every rank"
    dtype = "quantized matrices, the rest 16 bit" if footprint.quantized else f"{8 * footprint.element_bytes} bit"
    terms = [MemoryTerm(name="frozen weights", num_bytes=frozen_bytes(footprint, candidate)[0], reason=f"{dtype}, {held}")]
    if parted:
        gathered = 2 * footprint.largest_block_bytes + footprint.head_bytes
        terms.append(MemoryTerm(name="gathered weights", num_bytes=gathered, reason="a block, the next block and the head"))
    if footprint.quantized:
        opened = footprint.scratch_bytes
        terms.append(MemoryTerm(name="dequantized matrix", num_bytes=opened, reason="the largest one, during its multiplication"))
    return terms


def frozen_bytes(footprint: Footprint, candidate: Candidate) -> tuple[int, int]:
    """Frozen weights of a rank: (on the device, offloaded)."""
    packed = footprint.frozen_bytes - footprint.statistics_bytes
    share = -(-packed // candidate.ranks) if candidate.zero_stage == 3 else packed
    if candidate.offload == "parameters":
        return footprint.statistics_bytes, share
    return share + footprint.statistics_bytes, 0


def state_terms(footprint: Footprint, candidate: Candidate, shards: Shards) -> list[MemoryTerm]:
    """The numbers that learn: weights, gradients, sums, masters and Adam's moments (ZeRO: Rajbhandari et al. 2020)."""
    elements = f"{format_count(sum(footprint.learning_counts))} elements"
    shared = " on every rank" if candidate.executor == "torch" else f" on {candidate.ranks} ranks, ZeRO-{candidate.zero_stage}"
    split = shared if candidate.ranks > 1 else ""
    sizes = {
        "trainable weights": (shards.weight_bytes, f"{footprint.element_bytes} bytes"),
        "gradients": (shards.gradient_bytes, f"{footprint.element_bytes} bytes, kept between rounds"),
        "gradient sums": (shards.gradient_sum_bytes, "4 bytes"),
        "fp32 master weights": (shards.master_bytes, "4 bytes"),
        "Adam's moments": (shards.optimizer_bytes, "2 x 4 bytes"),
    }
    terms = [
        MemoryTerm(name=name, num_bytes=num_bytes, reason=f"{elements} x {each}{split}")
        for name, (num_bytes, each) in sizes.items()
    ]
    if footprint.anchor_copies:
        terms.append(
            MemoryTerm(name="anchor", num_bytes=anchor_bytes(footprint, shards), reason=f"{footprint.anchor_copies} x 4 bytes")
        )
    if shards.bucket_stays:
        terms.append(MemoryTerm(name="reduce bucket", num_bytes=shards.bucket_bytes, reason="gradient communication buffers"))
    return terms


def anchor_bytes(footprint: Footprint, shards: Shards) -> int:
    """As many numbers as there are masters; Adam's moments, which lie where those do, are two for each."""
    return footprint.anchor_copies * shards.optimizer_bytes // 2


def host_terms(footprint: Footprint, candidate: Candidate, shards: RankShards) -> list[MemoryTerm]:
    """What a rank puts into host memory; the last term comes and goes.

    What is offloaded, and a copy of the weights that are unfrozen, all the time. Its part of a checkpoint's masters and
    moments on their way to the disk. A 16-bit base that ZeRO-3 partitions is loaded there before: mapped from its files
    (measured: no anonymous memory) or, where they hold another dtype, as a copy; a quantized one is made on the device,
    matrix by matrix.
    """
    offloaded = shards.host.resting_bytes + anchor_bytes(footprint, shards.host) + frozen_bytes(footprint, candidate)[1]
    parted = candidate.zero_stage == 3
    copied = footprint.converted_bytes if parted and not footprint.quantized else 0
    saved = max(shards.device.master_bytes, shards.host.master_bytes) + max(
        shards.device.optimizer_bytes, shards.host.optimizer_bytes
    )
    restored = -(-footprint.restore_bytes // candidate.ranks) if parted else footprint.restore_bytes
    return [
        MemoryTerm(name="offloaded", num_bytes=offloaded, reason=f"{candidate.offload}, pinned"),
        MemoryTerm(
            name="copy for restoring the base",
            num_bytes=restored,
            reason="the base's values of the unfrozen weights, for the next trial",
        ),
        MemoryTerm(
            name="loading or saving",
            num_bytes=max(copied - offloaded, saved),
            reason="the larger of the base in the compute dtype, where its files hold another, and a checkpoint being written",
        ),
    ]
