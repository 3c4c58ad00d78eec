"""What `DeepSpeedZeroOptimizer` holds while a backward pass sends gradients (deepspeed 0.19.8, zero/stage_1_and_2.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class _Gradient:
    elements: int
    pieces: tuple[tuple[int, int], ...]
    """(partition, elements) of every partition that the tensor reaches into."""


def in_flight_bytes(counts: Sequence[int], *, share: int, size: int, bucket_elements: int, ranks: Iterable[int]) -> int:
    """The most that stage 2 has under way in a backward pass, beyond the bucket itself, on that of `ranks` with most.

    Gradients come in the reverse of the model's order and are copied into the bucket. One that no longer fits waits (e·n)
    while the bucket is sent. One larger than the bucket is not copied (`reduce_independent_p_g_buckets_and_remove_grads`):
    it is sent when the next one is there, and if this rank's partition has a piece of it, it stays until the pass is over
    (`copy_grads_in_partition` returns without clearing it; `_clear_param_grad_only` does).

    Args:
        counts: Elements of every tensor that learns, in the model's order.
        share: Elements of a partition.
        size: Bytes of an element in the compute dtype.
        bucket_elements: DeepSpeed's `reduce_bucket_size`.
        ranks: Whose partition is the rank's own, for each.
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
    """What is sent together."""
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
    """Partition -> number of a bucket, rising -> pieces of it that are the partition's."""
    reached: dict[int, dict[int, int]] = {}
    for number, bucket in enumerate(buckets):
        for gradient in bucket:
            for partition, _ in gradient.pieces:
                own = reached.setdefault(partition, {})
                own[number] = own.get(number, 0) + 1
    return reached


def _alone(bucket: Sequence[_Gradient], bucket_elements: int) -> int:
    """Elements of a gradient that the bucket cannot hold, which is sent by itself."""
    return bucket[0].elements if bucket[0].elements > bucket_elements else 0


def _at(buckets: Sequence[Sequence[_Gradient]], number: int, size: int, bucket_elements: int, rank: int | None) -> int:
    """The most while a bucket is sent, beyond what is kept; `rank` where more than one of its pieces is the rank's own."""
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
    """The copies that `average_tensor` makes of a bucket.

    Pieces that follow each other for one other rank are one piece; the rank's own stay apart. `allreduce_and_scatter` sends
    them in groups that end once they pass the bucket's size: flattened into a copy (e) where there are several, and in
    float32 (4) where the gradients are not.
    """
    pieces: list[tuple[int, int]] = []
    for partition, elements in (piece for gradient in bucket for piece in gradient.pieces):
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
