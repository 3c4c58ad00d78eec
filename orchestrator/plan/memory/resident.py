"""Resident memory of a rank: weights, training state, and what is in host memory. Symbols as in `plan.memory.estimate`."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from orchestrator.plan.estimates import MemoryTerm
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.memory.shards import RankShards, Shards, rank_shards
from orchestrator.units import format_count

REDUCE_BUCKET_ELEMENTS = 2**22
"""Maximum number of gradient elements that DeepSpeed collects before it reduces them; `train.engines.deepspeed_engine` passes
it on. Few elements are trainable, and a new engine is built for every trial, so large buckets would cost more than they save."""


def shards_of(footprint: Footprint, candidate: Candidate) -> RankShards:
    """Return the training state of the rank that holds the most, to the byte; see `plan.memory.shards`."""
    return _shards(
        footprint.learning_counts,
        footprint.element_bytes,
        replace(candidate, checkpointing=False, row_tokens=1, micro_batch_rows=1),
    )


@lru_cache(maxsize=4096)
def _shards(counts: tuple[int, ...], element_bytes: int, candidate: Candidate) -> RankShards:
    """Cached, since the ladder needs it at every micro-batch size, which it does not depend on."""
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
    """Return the frozen weights, and what is gathered or dequantized of them at a time.

    Stage 3 gathers a module's weights while it computes, and `stage3_max_reuse_distance: 0` frees them at once: a block and
    what is prefetched are less than two blocks, besides the head. Of quantized matrices it partitions only the packed weights;
    their statistics are whole on every rank.
    """
    partitioned = candidate.zero_stage == 3
    offloaded = candidate.offload == "parameters"
    where = (
        "offloaded"
        if offloaded
        else f"1/{candidate.ranks} of them"
        if partitioned and candidate.ranks > 1
        else "whole on every rank"
    )
    dtype = "quantized matrices, the rest 16 bit" if footprint.quantized else f"{8 * footprint.element_bytes} bit"
    terms = [MemoryTerm(name="frozen weights", num_bytes=frozen_bytes(footprint, candidate)[0], reason=f"{dtype}, {where}")]
    if partitioned:
        gathered = 2 * footprint.largest_block_bytes + footprint.head_bytes
        terms.append(MemoryTerm(name="gathered weights", num_bytes=gathered, reason="a block, the next block and the head"))
    if footprint.quantized:
        opened = footprint.scratch_bytes
        terms.append(MemoryTerm(name="dequantized matrix", num_bytes=opened, reason="the largest one, during its multiplication"))
    return terms


def frozen_bytes(footprint: Footprint, candidate: Candidate) -> tuple[int, int]:
    """Return the frozen weights of a rank: (on the device, offloaded)."""
    # bitsandbytes keeps the scales as plain attributes of the parameter, which ZeRO-3 does not partition.
    packed = footprint.frozen_bytes - footprint.statistics_bytes
    share = -(-packed // candidate.ranks) if candidate.zero_stage == 3 else packed
    if candidate.offload == "parameters":
        return footprint.statistics_bytes, share
    return share + footprint.statistics_bytes, 0


def state_terms(footprint: Footprint, candidate: Candidate, shards: Shards) -> list[MemoryTerm]:
    """Return the training state: weights, gradients, sums, fp32 master weights and Adam's moments (ZeRO: Rajbhandari et al.
    2020)."""
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
    """Return the anchor's copies, each as many elements as the master weights; Adam's two moments, stored with them, are twice
    that."""
    return footprint.anchor_copies * shards.optimizer_bytes // 2


def host_terms(footprint: Footprint, candidate: Candidate, shards: RankShards) -> list[MemoryTerm]:
    """Return what a rank allocates in host memory; the last term is transient.

    Resident: offloaded state, and a copy of the unfrozen base weights. Transient: the rank's share of a checkpoint's master
    weights and moments while they are written. A 16-bit base that ZeRO-3 partitions is first loaded there: memory-mapped from
    its files (measured: no anonymous memory) or, if they store another dtype, as a copy; a quantized base is created on the
    device, matrix by matrix.
    """
    offloaded = shards.host.resting_bytes + anchor_bytes(footprint, shards.host) + frozen_bytes(footprint, candidate)[1]
    partitioned = candidate.zero_stage == 3
    copied = footprint.converted_bytes if partitioned and not footprint.quantized else 0
    saved = max(shards.device.master_bytes, shards.host.master_bytes) + max(
        shards.device.optimizer_bytes, shards.host.optimizer_bytes
    )
    restored = -(-footprint.restore_bytes // candidate.ranks) if partitioned else footprint.restore_bytes
    return [
        MemoryTerm(name="offloaded", num_bytes=offloaded, reason=f"{candidate.offload}, pinned"),
        MemoryTerm(
            name="copy for restoring the base",
            num_bytes=restored,
            reason="the base's values of the unfrozen weights, for the next trial",
        ),
        MemoryTerm(
            # The copy is made before anything is offloaded, so only what exceeds the offloaded state is extra; and a run loads
            # before it saves, so the larger of the two counts.
            name="loading or saving",
            num_bytes=max(copied - offloaded, saved),
            reason="the larger of the base in the compute dtype, where its files hold another, and a checkpoint being written",
        ),
    ]
