"""Training state of one rank, to the byte, for every engine that the plan can choose.

Derived from the source of deepspeed 0.19.8 with the configuration that `train.engines.deepspeed_engine` writes, and compared
with the storages of real engines in tests/integration/test_shards.py. Symbols in the docstrings: n is the number of elements
of one tensor, P of all trainable ones, W the number of ranks, e the bytes of an element in the compute dtype (2 or 4), B the
elements of the reduce bucket. Master weights, moments and sums are float32. Scalars (norms, AdamW's step counter per master
weight) are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

ALIGNMENT = 2
"""A flat buffer of stages 1 and 2 is padded to a multiple of this many elements per rank: `nccl_start_alignment_factor`, in
bf16_optimizer.py and zero/stage_1_and_2.py."""
ALLREDUCE_ELEMENTS = 500_000_000
"""Stage 0 reduces gradients in groups that end once they exceed this: `MEMORY_OPT_ALLREDUCE_SIZE`, engine.py."""
SUB_GROUP_ELEMENTS = 10**9
"""Stage 3 updates partitions in groups that end once they reach this: `sub_group_size` of our configuration."""

Executor = Literal["torch", "deepspeed"]
Dtype = Literal["bfloat16", "float32"]
Stage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True)
class Shards:
    """Bytes of training state in one memory (device or host) of one rank."""

    weight_bytes: int = 0
    """Trainable weights as the model computes with them. In float32 without partitioning they are the master weights too."""
    gradient_bytes: int = 0
    """Gradients in the compute dtype that persist between the rounds of a step."""
    gradient_sum_bytes: int = 0
    """float32 sums of gradients that persist between the rounds of a step."""
    master_bytes: int = 0
    """fp32 master weights, which AdamW updates."""
    optimizer_bytes: int = 0
    """Adam's two moments; allocated at the first update."""
    bucket_bytes: int = 0
    """Buffer that collects gradients before they are reduced, during the backward pass."""
    in_flight_bytes: int = 0
    """Peak of the backward pass beyond all of the above, while a gradient is computed, converted and sent."""
    transient_bytes: int = 0
    """Peak of the update beyond the above."""
    bucket_stays: bool = False
    """True if the bucket still exists during the update."""

    @property
    def resting_bytes(self) -> int:
        """Bytes between two rounds, after the first update."""
        learned = self.weight_bytes + self.gradient_bytes + self.gradient_sum_bytes
        return learned + self.master_bytes + self.optimizer_bytes

    @property
    def backward_bytes(self) -> int:
        """Peak of a backward pass."""
        return self.resting_bytes + self.bucket_bytes + self.in_flight_bytes

    @property
    def update_bytes(self) -> int:
        """Peak of an update, after the activations are freed."""
        return self.resting_bytes + (self.bucket_bytes if self.bucket_stays else 0) + self.transient_bytes


@dataclass(frozen=True)
class RankShards:
    """Training state of a rank on its device, and in host memory if it is offloaded."""

    device: Shards
    host: Shards


def rank_shards(
    counts: Sequence[int],
    *,
    ranks: int,
    zero_stage: Stage,
    dtype: Dtype,
    executor: Executor,
    bucket_elements: int,
    offload: Offload = "none",
    rank: int | None = None,
) -> RankShards:
    """Return the training state of one rank in one trial.

    Args:
        counts: Elements of every trainable tensor, in the model's order.
        ranks: Number of ranks of the gang.
        zero_stage: Ignored if the executor is torch.
        dtype: Compute dtype of the model.
        executor: `torch` partitions nothing.
        bucket_elements: DeepSpeed's `reduce_bucket_size`.
        offload: Only stage 3 supports it.
        rank: Number of the rank; None for the one that holds the most. Ranks differ only in stages 1 and 2, where tensors are
            split at the partitions' bounds.
    """
    if not counts:
        return RankShards(device=Shards(), host=Shards())
    size = {"bfloat16": 2, "float32": 4}[dtype]
    if executor == "torch":
        return RankShards(device=_torch(counts, size), host=Shards())
    match zero_stage:
        case 0:
            return RankShards(device=_stage_0(counts, size), host=Shards())
        case 3:
            return _stage_3(counts, ranks, size, bucket_elements, offload)
        # DeepSpeed has an optimizer class of its own for stage 1 in bf16; in float32 stage 1 uses the class of stage 2.
        case 1 if size == 2:
            return RankShards(device=_bf16_optimizer(counts, ranks), host=Shards())
        case _:
            return RankShards(device=_stage_1_and_2(counts, ranks, zero_stage, size, bucket_elements, rank), host=Shards())


def _torch(counts: Sequence[int], size: int) -> Shards:
    """Return the state of `train.engines.torch_engine`: flat float32 master weights, sums and moments (4P, 4P, 8P). A gradient
    is freed as soon as it is added to its sum, so that only one exists at a time (e·n); the fused AdamW and the norm make no
    copies, and sums are all-reduced in place."""
    total = sum(counts)
    return Shards(
        weight_bytes=size * total,
        gradient_sum_bytes=4 * total,
        master_bytes=4 * total,
        optimizer_bytes=8 * total,
        in_flight_bytes=size * max(counts),
    )


def _stage_0(counts: Sequence[int], size: int) -> Shards:
    """bf16: `FP16_UnfusedOptimizer` (fp16/unfused_optimizer.py): gradients add up in `.grad` (2P), masters in `fp32_groups`
    (4P), moments 8P, nothing padded. float32: torch's AdamW itself, whose masters are the weights; gradients 4P.

    Update: `allreduce_bucket` (engine.py) flattens all gradients, up to 500M elements at a time, into a copy (e a element,
    none where it is one tensor), and in bf16 that one into float32 (4). Then, in bf16, `step` makes every gradient
    float32 (4P). The larger of the two.
    """
    total, piece, tensors = sum(counts), 0, 0
    largest = 0
    for count in counts:
        piece, tensors = piece + count, tensors + 1
        largest = max(largest, piece * ((size if tensors > 1 else 0) + (4 if size == 2 else 0)))
        if piece > ALLREDUCE_ELEMENTS:
            piece, tensors = 0, 0
    return Shards(
        weight_bytes=size * total,
        gradient_bytes=size * total,
        master_bytes=4 * total if size == 2 else 0,
        optimizer_bytes=8 * total,
        transient_bytes=max(largest, 4 * total if size == 2 else 0),
    )


def _bf16_optimizer(counts: Sequence[int], ranks: int) -> Shards:
    """Stage 1 in bf16 with float32 sums: `BF16_Optimizer` (bf16_optimizer.py). N is P padded to a multiple of 2W.

    Weights are views of `bf16_groups_flat` (2N). Their gradients are set to zero and kept (`clear_lp_grads`, 2P), and
    `fp32_groups_gradients_flat` holds the float32 sums of *all* of them, on every rank (4N): only masters
    (`fp32_groups_flat_partition`, 4N/W) and moments (8N/W) are partitioned.

    Backward: `_update_hp_grad` makes one gradient float32 at a time (4n). Update: in place; the weights are gathered in
    place by nccl. gloo gathers them into a copy (2N), on a CPU, which is not counted.
    """
    padded = _padded(sum(counts), ranks)
    return Shards(
        weight_bytes=2 * padded,
        gradient_bytes=2 * sum(counts),
        gradient_sum_bytes=4 * padded,
        master_bytes=4 * padded // ranks,
        optimizer_bytes=8 * padded // ranks,
        in_flight_bytes=4 * max(counts),
    )


def _stage_1_and_2(
    counts: Sequence[int], ranks: int, zero_stage: Stage, size: int, bucket_elements: int, rank: int | None
) -> Shards:
    """Stage 2, and stage 1 in float32: `DeepSpeedZeroOptimizer` (zero/stage_1_and_2.py). N is P padded to a multiple of 2W.

    Weights are views of `bit16_groups_flat` (e·N); masters `single_partition_of_fp32_groups` (4N/W), moments 8N/W.

    - Stage 2, bf16: sums in `averaged_gradients[i].flat_partition` (4N/W, `_build_compact_grad_partition_buffer`).
    - Stage 2, float32: `grads_in_partition` keeps, whole, every tensor of which the partition has a piece (4Q). In the
      rounds after the first the new ones are there beside the sums.
    - Stage 1, float32: gradients add up in `.grad` (4P); `grads_in_partition` (4Q) comes at the update.

    The bucket (`setup_buckets`, e·B) goes after each backward pass in stage 2, at the update in stage 1. In flight: see
    `plan.memory.shards`; in float32 the new `grads_in_partition` (4Q) are there too. Update: the norm
    makes one piece of a tensor float64 at a time (8 an element, `get_grad_norm_direct`); in float32 the pieces are
    flattened into a copy (4N/W). nccl gathers in place; gloo into a copy (e·N), which is not counted.
    """
    padded = _padded(sum(counts), ranks)
    share = padded // ranks
    partitions = _unlike_partitions(counts, share) if rank is None else {rank: _of_partition(counts, rank * share, share)}
    numbers, overlaps = list(partitions), list(partitions.values())
    touched = max(sum(whole for whole, _ in partition) for partition in overlaps)
    largest_piece = max((piece for partition in overlaps for _, piece in partition), default=0)
    in_flight = 0
    if zero_stage == 2:
        in_flight = in_flight_bytes(counts, share=share, size=size, bucket_elements=bucket_elements, ranks=numbers)
        in_flight += 4 * touched if size == 4 else 0
    sums = {1: 0, 2: 4 * share if size == 2 else 4 * touched}[zero_stage]
    norm_or_copy = max(8 * largest_piece, 4 * share if size == 4 else 0)
    return Shards(
        weight_bytes=size * padded,
        gradient_bytes=size * sum(counts) if zero_stage == 1 else 0,
        gradient_sum_bytes=sums,
        master_bytes=4 * share,
        optimizer_bytes=8 * share,
        bucket_bytes=size * bucket_elements,
        in_flight_bytes=in_flight,
        transient_bytes=max(4 * touched, norm_or_copy) if zero_stage == 1 else norm_or_copy,
        bucket_stays=zero_stage == 1,
    )


def _stage_3(counts: Sequence[int], ranks: int, size: int, bucket_elements: int, offload: Offload) -> RankShards:
    """`DeepSpeedZeroOptimizer_Stage3` (zero/stage3.py). Each tensor is partitioned separately: s = ⌈n/W⌉, S their sum.

    Weights are views of `lp_param_buffer` (e·S); sums `grad_partitions_flat_buffer` (4S) and the bucket
    (`ipg_buckets[...].buffer`, float32, 4B) are there from the start to the end; masters `fp32_partitioned_groups_flat` (4S,
    in float32 too), moments 8S.

    Backward: a full bucket is sent from a copy with every tensor padded to W·s (`reduce_scatter_coalesced`, 4), while the
    gradient that no longer fitted waits (e·n). A tensor larger than the bucket is sent singly: its gradient (e·n), its float32
    copy (4n, in bf16), a padded copy only if W does not divide n (4·W·s), and the next gradient.
    Update: `_prepare_fp32_grad_for_sub_group` flattens the sums of a group into a copy (4S, 10⁹ elements at a time); the
    norm makes one partition float64 (8s). The larger.

    Optimizer on the host: master weights, moments and sums are there, and a copy of the sums as `.grad` of the master weights
    (`initialize_optimizer_states`, 4S); on the device one partition at a time is normed, in float64 in addition to its float32
    (12s). Parameters on the host: also the weights (`param_groups_fp16_flat_cpu_memory`, e·S). Pinned memory, which a gang on
    GPUs uses, is rounded up to a power of two per buffer by torch's allocator; that is not counted.
    """
    shares = [-(-count // ranks) for count in counts]
    total, largest = sum(shares), max(counts)
    # Tensors that fit the bucket are sent together, each padded to a multiple of the ranks.
    small = sum(ranks * share for share, count in zip(shares, counts, strict=True) if count <= bucket_elements)
    in_flight = 4 * min(bucket_elements + ranks * len(counts), small) + size * largest
    for share, count in zip(shares, counts, strict=True):
        if count > bucket_elements:
            copies = (4 * count if size == 2 else 0) + (4 * ranks * share if count % ranks else 0)
            in_flight = max(in_flight, size * (count + largest) + copies)
    offloaded = offload != "none"
    state = Shards(gradient_sum_bytes=(8 if offloaded else 4) * total, master_bytes=4 * total, optimizer_bytes=8 * total)
    nothing, whole = Shards(), replace(state, weight_bytes=size * total)
    weights_alone = Shards(weight_bytes=size * total)
    device, host = {
        "none": (whole, nothing),
        "optimizer": (weights_alone, state),
        "parameters": (nothing, whole),
    }[offload]
    device = replace(
        device,
        bucket_bytes=4 * bucket_elements,
        in_flight_bytes=in_flight + (4 * max(shares) if offloaded else 0),
        transient_bytes=12 * max(shares) if offloaded else max(4 * _largest_group(shares), 8 * max(shares)),
        bucket_stays=True,
    )
    return RankShards(device=device, host=host)


def _padded(elements: int, ranks: int) -> int:
    """Return the size of a flat buffer: `align_dense_tensors` (runtime/utils.py) pads to the alignment times the ranks."""
    return -(-elements // (ALIGNMENT * ranks)) * ALIGNMENT * ranks


def _of_partition(counts: Sequence[int], start: int, share: int) -> list[tuple[int, int]]:
    """Return (elements of the whole tensor, elements of its piece) for every tensor that overlaps a partition."""
    ends = accumulate(counts)
    pieces = ((count, min(end, start + share) - max(end - count, start)) for count, end in zip(counts, ends, strict=True))
    return [(count, piece) for count, piece in pieces if piece > 0]


def _unlike_partitions(counts: Sequence[int], share: int) -> dict[int, list[tuple[int, int]]]:
    """Return `_of_partition` for every non-empty partition; of those inside one tensor, which are equal, only the first."""
    found: dict[int, list[tuple[int, int]]] = {}
    for end, count in zip(accumulate(counts), counts, strict=True):
        start = end - count
        first, last = start // share, (end - 1) // share
        # Of a tensor that spans many partitions, those inside it are equal: one of them represents all, so that the work does not
        # grow with the ranks.
        for number in sorted({first, min(first + 1, last), last}):
            piece = min(end, (number + 1) * share) - max(start, number * share)
            found.setdefault(number, []).append((count, piece))
    return found


def _largest_group(shares: Sequence[int]) -> int:
    """Return the elements of stage 3's largest sub-group (`_create_fp16_sub_groups`)."""
    if sum(shares) <= SUB_GROUP_ELEMENTS:
        return sum(shares)
    largest = group = 0
    for share in shares:
        group += share
        largest = max(largest, group)
        # DeepSpeed closes a group once it has reached the limit, so a group may exceed it by almost a tensor.
        if group >= SUB_GROUP_ELEMENTS:
            group = 0
    return largest


@dataclass(frozen=True)
class _Gradient:
    """One gradient and the partitions that it overlaps."""

    elements: int
    pieces: tuple[tuple[int, int], ...]
    """(partition, elements) for every partition that the tensor overlaps."""


def in_flight_bytes(counts: Sequence[int], *, share: int, size: int, bucket_elements: int, ranks: Iterable[int]) -> int:
    """Return the most that stage 2 has in flight in a backward pass, beyond the bucket itself, on the rank of `ranks` with the
    most.

    Gradients arrive in the reverse of the model's order and are copied into the bucket. One that no longer fits waits (e·n)
    while the bucket is sent. One larger than the bucket is not copied (`reduce_independent_p_g_buckets_and_remove_grads`): it
    is sent when the next one arrives, and if this rank's partition has a piece of it, it stays until the pass is over
    (`copy_grads_in_partition` returns without clearing it; `_clear_param_grad_only` does).

    Args:
        counts: Elements of every trainable tensor, in the model's order.
        share: Elements of a partition.
        size: Bytes of an element in the compute dtype.
        bucket_elements: DeepSpeed's `reduce_bucket_size`.
        ranks: Ranks to compare; each owns the partition with its number.
    """
    gradients = [_Gradient(n, _pieces(end - n, n, share)) for end, n in zip(accumulate(counts), counts, strict=True)]
    buckets = _buckets(gradients[::-1], bucket_elements)
    plain = [_at(buckets, number, size, bucket_elements, None) for number in range(len(buckets))]
    before = [0, *accumulate(plain, max)]
    after = [0, *accumulate(plain[::-1], max)][::-1]
    reached = _reached(buckets)
    most = 0
    for rank in ranks:
        # A partition is a run of elements, so the buckets that it reaches into follow each other: nothing is kept before
        # them, and nothing more after.
        own, kept = reached.get(rank, {}), 0
        first, last = (min(own), max(own)) if own else (len(buckets), len(buckets) - 1)
        most = max(most, before[first])
        for number, pieces in own.items():
            apart = pieces > 1
            there = _at(buckets, number, size, bucket_elements, rank) if apart else plain[number]
            most = max(most, size * kept + there)
            kept += _alone(buckets[number], bucket_elements)
        most = max(most, size * kept + after[last + 1])
    return most


def _buckets(gradients: Sequence[_Gradient], bucket_elements: int) -> list[list[_Gradient]]:
    """Return the gradients that are sent together."""
    buckets: list[list[_Gradient]] = [[]]
    filled = 0
    for gradient in gradients:
        if buckets[-1] and filled + gradient.elements > bucket_elements:
            buckets.append([])
            filled = 0
        buckets[-1].append(gradient)
        filled += gradient.elements
    return buckets


def _reached(buckets: Sequence[Sequence[_Gradient]]) -> dict[int, dict[int, int]]:
    """Return, for each partition, the numbers of the buckets that overlap it, ascending, each with its number of pieces there."""
    reached: dict[int, dict[int, int]] = {}
    for number, bucket in enumerate(buckets):
        for gradient in bucket:
            for partition, _ in gradient.pieces:
                own = reached.setdefault(partition, {})
                own[number] = own.get(number, 0) + 1
    return reached


def _alone(bucket: Sequence[_Gradient], bucket_elements: int) -> int:
    """Return the elements of a gradient that the bucket cannot hold and that is sent separately."""
    return bucket[0].elements if bucket[0].elements > bucket_elements else 0


def _at(buckets: Sequence[Sequence[_Gradient]], number: int, size: int, bucket_elements: int, rank: int | None) -> int:
    """Return the peak while a bucket is sent, beyond the gradients that stay; `rank` is given if it owns more than one of the
    bucket's pieces."""
    bucket = buckets[number]
    waiting = buckets[number + 1][0].elements if number + 1 < len(buckets) else 0
    largest = max(gradient.elements for gradient in bucket)
    alone = _alone(bucket, bucket_elements)
    return max(size * largest, size * (alone + waiting) + _sent(bucket, size, bucket_elements, rank))


def _pieces(start: int, elements: int, share: int) -> tuple[tuple[int, int], ...]:
    first, last = start // share, (start + elements - 1) // share
    return tuple(
        (number, min(start + elements, (number + 1) * share) - max(start, number * share)) for number in range(first, last + 1)
    )


def _sent(bucket: Sequence[_Gradient], size: int, bucket_elements: int, rank: int | None) -> int:
    """Return the size of the copies that `average_tensor` makes of a bucket.

    Consecutive pieces for one other rank are merged; the rank's own stay separate. `allreduce_and_scatter` sends them in
    groups that end once they exceed the bucket's size: flattened into a copy (e) if there are several, and in float32 (4) if
    the gradients are not.
    """
    pieces: list[tuple[int, int]] = []
    for partition, elements in (piece for gradient in bucket for piece in gradient.pieces):
        # `average_tensor` joins neighbouring pieces for the same rank, except for the rank that runs it.
        if pieces and pieces[-1][0] == partition != rank:
            pieces[-1] = (partition, pieces[-1][1] + elements)
        else:
            pieces.append((partition, elements))
    most = group = in_group = 0
    for _, elements in pieces:
        group, in_group = group + elements, in_group + 1
        most = max(most, group * ((size if in_group > 1 else 0) + (4 if size == 2 else 0)))
        if group > bucket_elements:
            group = in_group = 0
    return most
