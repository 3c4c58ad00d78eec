"""Where gangs stand, on any cluster."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.plan.placement import assign_gangs, count_gangs, machines, placement
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.spec.models import ResourcesSpec
from orchestrator.units import GIB


def cluster(*sizes: int) -> ClusterDescription:
    nodes = (
        NodeDescription(num_cpus=96, num_gpus=size, gpu_memory_bytes=80 * GIB, gpu_name="H100", memory_bytes=1000 * GIB)
        for size in sizes
    )
    return ClusterDescription(nodes=tuple(nodes), source="test")


def stands_of(places: list[int], ranks: int) -> list[tuple[tuple[int, int], ...]]:
    """Gang by gang, every node a kind of its own."""
    return [nodes for times, nodes in assign_gangs([(1, each) for each in places], ranks) for _ in range(times)]


@pytest.mark.parametrize(
    ("places", "ranks", "stands"),
    [
        ([8], 3, [((0, 3),), ((0, 3),)]),
        ([8, 8], 8, [((0, 8),), ((1, 8),)]),
        ([8, 8, 8, 8], 16, [((0, 8), (1, 8)), ((2, 8), (3, 8))]),
        ([8, 4, 8], 16, [((0, 8), (2, 8))]),
        ([8, 4, 8], 12, [((0, 8), (1, 4))]),
        ([8, 4, 8], 20, [((0, 8), (1, 4), (2, 8))]),
        ([8, 4, 8], 21, []),
        ([8, 8], 10, [((0, 8), (1, 2))]),
        ([8, 4, 4, 4, 4], 8, [((0, 8),), ((1, 4), (2, 4)), ((3, 4), (4, 4))]),
        ([2, 2, 8], 3, [((2, 3),), ((2, 3),), ((0, 2), (1, 1))]),
        ([6, 5, 4], 7, [((0, 6), (2, 1))]),
    ],
)
def test_gangs_stand_inside_nodes_or_on_whole_ones(places: list[int], ranks: int, stands: list[Any]) -> None:
    assert stands_of(places, ranks) == stands


@given(places=st.lists(st.integers(0, 9), min_size=1, max_size=12), ranks=st.integers(1, 40))
def test_no_gpu_is_used_twice_and_no_gang_that_fits_is_forgotten(places: list[int], ranks: int) -> None:
    gangs = stands_of(places, ranks)
    used = [0] * len(places)
    spanned: list[int] = []
    for gang in gangs:
        assert sum(held for _, held in gang) == ranks
        assert len({node for node, _ in gang}) == len(gang)
        if len(gang) > 1:
            spanned += [node for node, _ in gang]
            assert all(places[node] < ranks for node, _ in gang), "a gang that one node holds lies inside one"
            assert sum(held < places[node] for node, held in gang) <= 1, "whole nodes, but for the rest"
        for node, held in gang:
            assert held > 0
            used[node] += held
    assert all(held <= free for held, free in zip(used, places, strict=True))
    assert len(spanned) == len(set(spanned)), "a node that a spanning gang takes is its own"
    assert all(free - held < ranks for held, free in zip(used, places, strict=True) if free >= ranks)
    assert bool(gangs) == (sum(places) >= ranks)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    most=st.none() | st.integers(1, 80),
    ranks=st.integers(1, 30),
)
def test_what_gangs_hold_and_what_is_left_over_is_all_there_is(sizes: list[int], most: int | None, ranks: int) -> None:
    found = machines(cluster(*sizes), ResourcesSpec(max_gpus=most))
    count = found.max_gangs(ranks)
    assert count * ranks <= min(sum(sizes), most or sum(sizes))
    assume(count)
    stood = found.placement(ranks, count, "nobody asked for more")
    assert stood.num_gangs == count
    assert count * ranks + stood.left_over == sum(sizes)
    assert sum(kind.gangs_inside for kind in stood.nodes) + stood.num_spanning == count
    assert all(0 <= kind.left_over <= kind.count * 9 for kind in stood.nodes)
    assert (stood.left_over > 0) == (len(stood.sentences) == 2)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_every_size_that_a_gang_may_have_has_a_place(sizes: list[int]) -> None:
    found = machines(cluster(*sizes), ResourcesSpec())
    assert all(found.max_gangs(ranks) >= 1 for ranks in found.rank_counts())


def test_more_gpus_never_make_fewer_gangs_of_equal_nodes() -> None:
    for ranks in range(1, 33):
        counts = [count_gangs([(nodes, 8)], ranks) for nodes in range(1, 9)]
        assert counts == sorted(counts)


def test_the_sentences_say_where_and_why() -> None:
    assert placement([("8 x H100", 4, 8)], 32, 1, unit="GPU").sentences == (
        "1 gang of 32 GPUs, over 4 nodes: no single node is large enough for one",
    )
    assert placement([("8 x H100", 4, 8)], 8, 4, unit="GPU").sentences == ("4 gangs of 8 GPUs, each inside one node",)
    assert placement([("8 x H100", 2, 8)], 3, 4, unit="GPU").sentences[1] == (
        "4 of 16 GPUs are left over: no further gang of 3 fits"
    )
    assert placement([("8 x H100", 1, 8)], 1, 3, unit="GPU", bound="max_gpus allows 3").sentences == (
        "3 gangs of 1 GPU on one node",
        "5 of 8 GPUs are left over: max_gpus allows 3",
    )
    mixed = placement([("8 x H100", 1, 8), ("4 x L4", 4, 4)], 8, 3, unit="GPU")
    assert mixed.sentences == ("3 gangs of 8 GPUs, within one node where it fits, else over up to 2 whole nodes",)
    assert [(kind.gangs_inside, kind.ranks_spanning, kind.left_over) for kind in mixed.nodes] == [(1, 0, 0), (0, 16, 0)]


def test_gangs_that_would_share_a_node_with_a_part_of_another_are_refused() -> None:
    """Three gangs of five on two nodes of eight: 15 of 16 GPUs, and the third would lie over both."""
    with pytest.raises(PlanError, match="no gang shares a node with part of another gang: there is room for 2") as caught:
        machines(cluster(8, 8), ResourcesSpec(gangs=3, ranks_per_gang=5))
    assert caught.value.exit_code == 3
    assert machines(cluster(8, 8), ResourcesSpec(gangs=2, ranks_per_gang=5)).max_gangs(5) == 2


def test_host_memory_is_for_the_ranks_that_stand_on_a_node_together() -> None:
    """Eight places do not matter where the job has one rank, or where only two gangs of three go into them."""
    whole = machines(cluster(8), ResourcesSpec()).room(1, 8)
    one = machines(cluster(8), ResourcesSpec(max_gpus=1)).room(1, 1)
    threes = machines(cluster(8, 8), ResourcesSpec()).room(3, 4)
    assert [room.host_bytes // GIB for room in (whole, one, threes)] == [125, 1000, 166]
    assert [room.ranks_per_node for room in (whole, one, threes)] == [8, 1, 6]


@given(
    kinds=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=5, unique_by=lambda kind: kind[1]),
    ranks=st.integers(1, 40),
)
def test_like_nodes_stand_together_as_they_do_one_by_one(kinds: list[tuple[int, int]], ranks: int) -> None:
    places = [each for count, each in kinds for _ in range(count)]
    together = sorted(sorted(held for _, held in nodes) for times, nodes in assign_gangs(kinds, ranks) for _ in range(times))
    assert together == sorted(sorted(held for _, held in gang) for gang in stands_of(places, ranks))


def test_sizes_of_gangs_on_many_nodes_are_few() -> None:
    def sizes(nodes: int) -> list[int]:
        (node,) = cluster(8).nodes
        many = ClusterDescription(nodes=(node.model_copy(update={"count": nodes}),), source="test")
        return machines(many, ResourcesSpec()).rank_counts()

    assert sizes(4) == [1, 2, 4, 8, 16, 24, 32]
    assert sizes(20) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 128, 160]
    assert sizes(100_000)[-3:] == [4096, 8192, 16384]
