"""The rank that holds most is found without looking at every rank."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.memory.shards import rank_shards


@given(
    counts=st.lists(st.integers(1, 60) | st.integers(1, 3000), min_size=1, max_size=30),
    ranks=st.integers(1, 40),
    zero_stage=st.sampled_from([1, 2]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    bucket_elements=st.sampled_from([10, 100, 1000]),
)
def test_the_most_of_any_rank_is_the_most_of_all(
    counts: list[int], ranks: int, zero_stage: Any, dtype: Any, bucket_elements: int
) -> None:
    def held(rank: int | None) -> dict[str, int]:
        found = rank_shards(
            counts,
            ranks=ranks,
            zero_stage=zero_stage,
            dtype=dtype,
            executor="deepspeed",
            bucket_elements=bucket_elements,
            rank=rank,
        )
        return asdict(found.device)

    each = [held(rank) for rank in range(ranks)]
    whole = held(None)
    for term in ("gradient_sum_bytes", "transient_bytes"):
        assert whole[term] == max(one[term] for one in each)
    assert whole["in_flight_bytes"] >= max(one["in_flight_bytes"] for one in each)


@pytest.mark.parametrize(("zero_stage", "dtype"), [(2, "bfloat16"), (2, "float32"), (1, "float32")])
def test_thousands_of_ranks_take_no_time(zero_stage: Any, dtype: Any) -> None:
    counts = [8192 * 8192, 1024 * 8192, 28672 * 8192, 8192] * 200
    started = time.process_time()
    rank_shards(counts, ranks=4096, zero_stage=zero_stage, dtype=dtype, executor="deepspeed", bucket_elements=2**22)
    assert time.process_time() - started < 1.0
