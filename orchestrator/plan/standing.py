"""Where gangs stand: inside a node where they fit into one, on whole nodes where they do not. Nothing is used twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.plan.estimates import NodePlaces, Placement


class Stands(NamedTuple):
    """Gangs that stand alike."""

    times: int
    nodes: tuple[tuple[int, int], ...]
    """(kind of node, ranks on it) for every node of one such gang, rising."""


def lay_out(kinds: Sequence[tuple[int, int]], ranks: int) -> list[Stands]:
    """Every gang of `ranks` that there is room for. What it takes does not grow with the nodes of a kind.

    Nodes that hold a gang take as many as they can; what remains of them is left over. Smaller nodes are taken whole,
    several to a gang: largest first while they are needed whole, then the smallest that covers the rest, whose
    remainder no other gang uses.

    Args:
        kinds: (nodes, ranks that each has room for) for each kind of node.
    """
    gangs = [
        Stands(count * (each // ranks), ((kind, ranks),)) for kind, (count, each) in enumerate(kinds) if count and each >= ranks
    ]
    free = {kind: count for kind, (count, each) in enumerate(kinds) if count and 0 < each < ranks}
    order = sorted(free, key=lambda kind: (-kinds[kind][1], kind))
    while sum(count * kinds[kind][1] for kind, count in free.items()) >= ranks:
        whole: dict[int, int] = {}
        missing = ranks
        for kind in order:
            whole[kind] = min(free[kind], missing // kinds[kind][1])
            missing -= whole[kind] * kinds[kind][1]
        stood = [(kind, kinds[kind][1]) for kind, count in whole.items() for _ in range(count)]
        if missing:
            # Every node that was passed over has more places than were missing then.
            rest = min((kind for kind in order if free[kind] > whole[kind]), key=lambda kind: (kinds[kind][1], kind))
            stood.append((rest, missing))
            whole[rest] += 1
        times = min(free[kind] // count for kind, count in whole.items() if count)
        gangs.append(Stands(times, tuple(sorted(stood))))
        free = {kind: count - times * whole[kind] for kind, count in free.items()}
    return gangs


def count_gangs(kinds: Sequence[tuple[int, int]], ranks: int) -> int:
    """How many gangs of `ranks` there is room for."""
    return sum(stands.times for stands in lay_out(kinds, ranks))


def placement(kinds: Sequence[tuple[str, int, int]], ranks: int, num_gangs: int, *, unit: str, bound: str = "") -> Placement:
    """Where `num_gangs` gangs stand, what is left over, and why.

    Args:
        kinds: (description, nodes, places of a node) for each kind of node.
        bound: Why there are no more gangs, where there is room for more.
    """
    room = lay_out([(count, each) for _, count, each in kinds], ranks)
    gangs = _first(room, num_gangs)
    inside, spanning = Counter[int](), Counter[int]()
    for times, nodes_of_one in gangs:
        for kind, held in nodes_of_one:
            (inside if len(nodes_of_one) == 1 else spanning)[kind] += times * held
    nodes = tuple(
        NodePlaces(
            node=name,
            count=count,
            gangs_inside=inside[index] // ranks,
            ranks_spanning=spanning[index],
            left_over=count * each - inside[index] - spanning[index],
        )
        for index, (name, count, each) in enumerate(kinds)
    )
    sentences = [_where(gangs, ranks, sum(count for _, count, _ in kinds), unit)]
    left, total = sum(kind.left_over for kind in nodes), sum(count * each for _, count, each in kinds)
    if left:
        why = bound if num_gangs < sum(stands.times for stands in room) else f"no further gang of {ranks} fits"
        sentences.append(f"{left} of {total} {unit}s {'is' if left == 1 else 'are'} left over: {why}")
    return Placement(
        unit=unit,
        ranks=ranks,
        num_gangs=sum(stands.times for stands in gangs),
        num_spanning=sum(stands.times for stands in gangs if len(stands.nodes) > 1),
        nodes=nodes,
        sentences=tuple(sentences),
    )


def _first(room: Sequence[Stands], num_gangs: int) -> list[Stands]:
    taken: list[Stands] = []
    for stands in room:
        times = min(stands.times, num_gangs)
        num_gangs -= times
        if times:
            taken.append(stands._replace(times=times))
    return taken


def _where(gangs: Sequence[Stands], ranks: int, num_nodes: int, unit: str) -> str:
    """`4 gangs of 8 GPUs, each inside one node`."""
    count = sum(stands.times for stands in gangs)
    said = f"{count} gang{'s' if count != 1 else ''} of {ranks} {unit}{'s' if ranks != 1 else ''}"
    if num_nodes == 1:
        return f"{said} on one node"
    spans = sorted({len(stands.nodes) for stands in gangs})
    if spans == [1]:
        return f"{said}, each inside one node"
    over = f"{spans[0]}" if len(spans) == 1 else f"{spans[0]} to {spans[-1]}"
    return (
        f"{said}, {'each ' if count > 1 else ''}over {over} nodes: no single node is large enough for one"
        if spans[0] > 1
        else (f"{said}, within one node where it fits, else over up to {spans[-1]} whole nodes")
    )
