"""Where gangs stand: inside a node where they fit into one, on whole nodes where they do not. Nothing is used twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from orchestrator.plan.estimates import NodePlaces, Placement

Stand = tuple[tuple[int, int], ...]
"""One gang: (index of a node, ranks on it), rising by node."""


def lay_out(places: Sequence[int], ranks: int) -> list[Stand]:
    """Every gang of `ranks` that there is room for.

    Nodes that hold a gang take as many as they can; what remains of them is left over. Smaller nodes are taken whole,
    several to a gang: largest first while they are needed whole, then the smallest that covers the rest, whose
    remainder no other gang uses.

    Args:
        places: Ranks that each node has room for.
    """
    inside = [((index, ranks),) for index, free in enumerate(places) for _ in range(free // ranks)]
    small = sorted((index for index, free in enumerate(places) if 0 < free < ranks), key=lambda index: (-places[index], index))
    gangs: list[Stand] = list(inside)
    while sum(places[index] for index in small) >= ranks:
        taken: list[tuple[int, int]] = []
        missing = ranks
        for index in small:
            if places[index] <= missing:
                taken.append((index, places[index]))
                missing -= places[index]
        if missing:
            used = {index for index, _ in taken}
            # Every node that was passed over has more places than were missing then.
            taken.append((min((i for i in small if i not in used), key=lambda i: (places[i], i)), missing))
        gangs.append(tuple(sorted(taken)))
        used = {index for index, _ in taken}
        small = [index for index in small if index not in used]
    return gangs


def placement(kinds: Sequence[tuple[str, int, int]], ranks: int, num_gangs: int, *, unit: str, bound: str = "") -> Placement:
    """Where `num_gangs` gangs stand, what is left over, and why.

    Args:
        kinds: (description, nodes, places of a node) for each kind of node.
        bound: Why there are no more gangs, where there is room for more.
    """
    places = [each for _, count, each in kinds for _ in range(count)]
    kind_of = [index for index, (_, count, _) in enumerate(kinds) for _ in range(count)]
    room = lay_out(places, ranks)
    gangs = room[:num_gangs]
    inside, spanning = Counter[int](), Counter[int]()
    for gang in gangs:
        for node, held in gang:
            (inside if len(gang) == 1 else spanning)[kind_of[node]] += held
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
    sentences = [_where(gangs, ranks, len(places), unit)]
    left, total = sum(kind.left_over for kind in nodes), sum(places)
    if left:
        why = bound if num_gangs < len(room) else f"no further gang of {ranks} fits"
        sentences.append(f"{left} of {total} {unit}s {'is' if left == 1 else 'are'} left over: {why}")
    return Placement(
        unit=unit,
        ranks=ranks,
        num_gangs=len(gangs),
        num_spanning=sum(len(gang) > 1 for gang in gangs),
        nodes=nodes,
        sentences=tuple(sentences),
    )


def _where(gangs: Sequence[Stand], ranks: int, num_nodes: int, unit: str) -> str:
    """`4 gangs of 8 GPUs, each inside one node`."""
    count = len(gangs)
    said = f"{count} gang{'s' if count != 1 else ''} of {ranks} {unit}{'s' if ranks != 1 else ''}"
    if num_nodes == 1:
        return f"{said} on one node"
    spans = sorted({len(gang) for gang in gangs})
    if spans == [1]:
        return f"{said}, each inside one node"
    over = f"{spans[0]}" if len(spans) == 1 else f"{spans[0]} to {spans[-1]}"
    return (
        f"{said}, {'each ' if count > 1 else ''}over {over} nodes: no node holds one"
        if spans[0] > 1
        else (f"{said}, inside a node where one fits, else over up to {spans[-1]} whole nodes")
    )
