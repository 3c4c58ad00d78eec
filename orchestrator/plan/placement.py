"""Decide how many ranks and gangs the machines can hold, how much memory each rank has, and on which nodes the gangs are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.errors import PlanError
from orchestrator.plan.estimates import NodeSlots, Placement
from orchestrator.plan.ladder import RankRoom
from orchestrator.plan.memory.candidate import Device
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.spec.models import ResourcesSpec

RANK_CPUS = 0.9
"""Logical CPUs of a rank on a cluster without GPUs; the rest of each core is for the processes in which Tune tracks the
trials."""
GPU_RANK_CPUS = 0.5
"""Logical CPUs of a rank with a GPU; the processes that track its trials must fit on the node too."""
THIN_TRIAL_CPUS = 0.01
"""Logical CPUs of the process that tracks one trial."""
TRIALS_PER_GANG = 2
"""Trials kept open per gang: Tune needs about a second to start one, and its gang works on another meanwhile."""
FEW_NODES = 8
"""Up to this many nodes, gangs over any number of nodes are tried; beyond it, only over powers of two."""
MAX_GANG_RANKS = 2**14
"""No larger gang is planned unless the spec requests it."""
MAX_THREADS = 2**16
"""Limit on the threads of a rank if the environment sets none."""
MAX_GPU_RANK_THREADS = 8
"""Threads of a rank with a GPU: its CPU work is loading data and launching kernels, and more threads gain nothing."""


@dataclass(frozen=True)
class Machines:
    """The part of a cluster that a job may use. A unit is a GPU with the CPUs of its rank, or on a cluster without GPUs a
    core."""

    device: Device
    nodes: tuple[NodeDescription, ...]
    num_units: int
    """Number of usable units, limited by `max_gpus`, which limits cores if the job trains on cores."""
    max_threads: int | None = None
    """Limit on the threads of one rank that the environment sets (OMP_NUM_THREADS)."""
    left_out: tuple[NodeDescription, ...] = ()
    """Nodes with less memory that the job is planned without."""

    @property
    def unit(self) -> str:
        return "GPU" if self.device == "cuda" else "core"

    def units_of(self, node: NodeDescription) -> int:
        return num_slots(node, self.device)

    @property
    def units_per_node(self) -> int:
        """Number of units on the largest node."""
        return max(self.units_of(node) for node in self.nodes)

    def room(self, ranks: int, num_gangs: int) -> RankRoom:
        """Return the memory that each rank of `num_gangs` gangs of `ranks` may fill, on the node with the least.

        A node's memory is divided among the ranks that can run there at the same time, which are fewer than its slots if the
        job has fewer ranks.
        """
        standing = {node: self._ranks_on(node, ranks, ranks * num_gangs) for node in self.nodes}
        hosting = min(self.nodes, key=lambda node: node.memory_bytes // standing[node])
        host_bytes = hosting.memory_bytes // standing[hosting]
        on_gpus = self.device == "cuda"
        tightest = min(self.nodes, key=lambda node: node.gpu_memory_bytes) if on_gpus else hosting
        unlike = any(node.model_copy(update={"count": self.nodes[0].count}) != self.nodes[0] for node in self.nodes)
        return RankRoom(
            device_bytes=tightest.gpu_memory_bytes if on_gpus else host_bytes,
            host_bytes=host_bytes,
            ranks_per_node=min(standing.values()),
            device_node=self.name_of(tightest) if unlike else "",
            host_node=self.name_of(hosting) if unlike else "",
        )

    def room_of_one(self, ranks: int) -> RankRoom:
        """Return the memory of each rank if there is only one gang."""
        return self.room(ranks, 1)

    def _ranks_on(self, node: NodeDescription, ranks: int, all_ranks: int) -> int:
        # A node holds whole gangs, or, if it is smaller than a gang, one gang's ranks on all of its slots: no gang shares a node
        # with part of another gang.
        slots = self.units_of(node)
        return min(slots // ranks * ranks or slots, all_ranks)

    def threads(self, num_ranks: int) -> int:
        """Return the threads of each rank if `num_ranks` run at once: its share of the cores, up to the environment's limit."""
        return min(self.threads_of_cores(num_ranks), self.max_threads or MAX_THREADS)

    def threads_of_cores(self, num_ranks: int) -> int:
        """Return the threads of each rank without the environment's limit."""
        if self.device == "cuda":
            return max(1, min(MAX_GPU_RANK_THREADS, min(node.num_cpus // node.num_gpus for node in self.nodes)))
        cores = [min(node.num_cpus, self.num_units) for node in self.nodes]
        return max(1, min(each // min(num_ranks, each) for each in cores))

    def rank_counts(self) -> list[int]:
        """Return the sizes that a gang may have, ascending: powers of two inside a node; then 1 to 7 whole nodes; then powers
        of two of nodes; then everything."""
        per_node = self.units_per_node
        inside = [2**power for power in range(per_node.bit_length()) if 2**power < per_node]
        powers = [2**power for power in range((MAX_GANG_RANKS // per_node).bit_length())]
        # Every count up to FEW_NODES, beyond it powers of two: the time to plan must not grow with the cluster.
        nodes = [per_node * count for count in (*range(1, FEW_NODES), *powers)]
        most = min(self.num_units, max(MAX_GANG_RANKS, per_node))
        return sorted({n for n in (*inside, *nodes, most) if n <= most})

    def max_gangs(self, ranks: int) -> int:
        """Return how many gangs of `ranks` fit: inside nodes if they are large enough, else on whole nodes."""
        return min(count_gangs([(node.count, self.units_of(node)) for node in self.nodes], ranks), self.num_units // ranks)

    def placement(self, ranks: int, num_gangs: int, why_no_more: str) -> Placement:
        """Assign the gangs to nodes.

        Args:
            why_no_more: Why there are no more gangs, unless the reason is lack of room or `max_gpus`.
        """
        kinds = [(self.name_of(node), node.count, self.units_of(node)) for node in self.nodes]
        is_limited = num_gangs == self.max_gangs(ranks)
        bound = f"max_gpus allows {self.num_units}" if is_limited else why_no_more
        return placement(kinds, ranks, num_gangs, unit=self.unit, bound=bound)

    def name_of(self, node: NodeDescription) -> str:
        return f"{self.units_of(node)} x {node.gpu_name or 'GPU'}" if self.device == "cuda" else f"{node.num_cpus} cores"

    @property
    def gpu_hour_price(self) -> float | None:
        """Mean price of a GPU-hour over the GPUs of the cluster file; None if any node has no price."""
        paid = [(node.gpu_hour_price, node.count * self.units_of(node)) for node in self.nodes if node.gpu_hour_price is not None]
        return sum(price * gpus for price, gpus in paid) / sum(gpus for _, gpus in paid) if len(paid) == len(self.nodes) else None


def num_slots(node: NodeDescription, device: Device) -> int:
    """Return how many ranks Ray can place on a node; besides a GPU each takes some CPU, and so do the processes of its trials."""
    if device == "cpu":
        return node.num_cpus
    # A rank that finds a GPU but no CPU would wait in Ray forever, so such GPUs must not be planned for.
    return min(node.num_gpus, math.floor(node.num_cpus / (GPU_RANK_CPUS + TRIALS_PER_GANG * THIN_TRIAL_CPUS)))


def machines(cluster: ClusterDescription, resources: ResourcesSpec) -> Machines:
    """Return the machines that the job may use.

    Raises:
        PlanError: `accelerator: gpu` on a cluster without GPUs; a cluster without nodes; more ranks than units; no CPU for a
            rank.
    """
    if not cluster.nodes:
        raise PlanError("the cluster has no nodes", where=cluster.source, remedy="start one, or describe one in a file")
    wants_gpu = resources.accelerator == "gpu" or (resources.accelerator == "auto" and cluster.num_gpus > 0)
    if wants_gpu and not cluster.num_gpus:
        raise PlanError(
            f"a GPU is required, and {cluster.source or 'the cluster'} has none",
            where="resources.accelerator",
            expected="accelerator: auto or cpu",
            remedy="resources.accelerator: auto, or a cluster with GPUs",
        )
    device: Device = "cuda" if wants_gpu else "cpu"
    nodes = tuple(node for node in cluster.nodes if num_slots(node, device))
    if not nodes:
        raise PlanError(
            f"no rank can be placed: the cluster has {cluster.num_gpus} GPUs and {cluster.num_cpus} CPUs",
            where=cluster.source,
            expected=f"{GPU_RANK_CPUS} CPUs on the same node for each rank with a GPU" if wants_gpu else "a CPU for each rank",
            remedy="start Ray's nodes with their CPUs (--num-cpus)",
        )
    total = sum(node.count * num_slots(node, device) for node in nodes)
    num_units = min(total, resources.max_gpus or total)
    found = Machines(device=device, nodes=nodes, num_units=num_units, max_threads=cluster.max_threads)
    _check_asked_ranks(found, resources, total, cluster)
    return found


def node_subsets(cluster: ClusterDescription, resources: ResourcesSpec) -> list[Machines]:
    """Return the whole cluster, and then the parts of it that leave out the nodes with the least memory.

    Ranks are planned for the smallest node, so one node that is not needed may make the others useless. Nodes are compared by
    GPU memory, host memory and host memory per slot; every figure that some node has is tried as a lower bound.

    Raises:
        PlanError: as in `machines`, for the whole cluster.
    """
    whole = machines(cluster, resources)
    gpu_memories = {node.gpu_memory_bytes for node in whole.nodes}
    memories = {node.memory_bytes for node in whole.nodes}
    shares = {node.memory_bytes // whole.units_of(node) for node in whole.nodes}
    found = {whole.nodes: whole}
    # A node's memory is shared by its ranks, so a node may have too little in total or too little per slot: both bounds are
    # tried.
    for gpu_memory, memory, share in sorted(
        {(gpu, memory, 0) for gpu in gpu_memories for memory in memories}
        | {(gpu, 0, share) for gpu in gpu_memories for share in shares}
    ):
        nodes = tuple(
            node
            for node in whole.nodes
            if node.gpu_memory_bytes >= gpu_memory
            and node.memory_bytes >= memory
            and node.memory_bytes // whole.units_of(node) >= share
        )
        if not nodes or nodes in found:
            continue
        # A part of the cluster may be too small for the gangs that the spec requests; the whole cluster has passed that check.
        with suppress(PlanError):
            part = machines(cluster.model_copy(update={"nodes": nodes}), resources)
            found[nodes] = replace(part, left_out=tuple(node for node in whole.nodes if node not in nodes))
    return list(found.values())


def idle_gpus(cluster: ClusterDescription) -> int:
    """Return the number of GPUs that no rank can use because their nodes have too few CPUs."""
    return sum(node.count * (node.num_gpus - num_slots(node, "cuda")) for node in cluster.nodes)


def _check_asked_ranks(found: Machines, resources: ResourcesSpec, total: int, cluster: ClusterDescription) -> None:
    ranks = 1 if resources.ranks_per_gang == "auto" else resources.ranks_per_gang
    gangs = 1 if resources.gangs == "auto" else resources.gangs
    room = found.max_gangs(ranks)
    if gangs <= room:
        return
    has = f"the cluster has {total}"
    if found.device == "cuda" and idle_gpus(cluster):
        has = f"the cluster's CPUs ({cluster.num_cpus}) place ranks on {total} of its {cluster.num_gpus}"
    bound = f"max_gpus: {resources.max_gpus} allows {found.num_units}" if found.num_units < total else has
    if ranks * gangs <= found.num_units:
        bound = f"no gang shares a node with part of another gang: there is room for {room}"
    raise PlanError(
        f"{_count(gangs, 'gang')} of {_count(ranks, 'rank')} need{'s' if gangs == 1 else ''} "
        f"{_count(ranks * gangs, found.unit)}, and {bound}",
        where="resources",
        expected=f"at most {_count(room, 'gang')} of {_count(ranks, 'rank')}"
        if room
        else f"gangs of at most {_count(found.num_units, 'rank')}",
        remedy="leave gangs and ranks_per_gang to `auto`, or lower them",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class GangGroup(NamedTuple):
    """A number of gangs that are assigned to nodes in the same way."""

    times: int
    nodes: tuple[tuple[int, int], ...]
    """(kind of node, ranks on it) for every node of one such gang, ascending."""


def assign_gangs(kinds: Sequence[tuple[int, int]], ranks: int) -> list[GangGroup]:
    """Assign as many gangs of `ranks` as fit. The time it takes does not depend on the number of nodes of a kind.

    Nodes that can hold a gang take as many as fit; their remaining slots are left over. Smaller nodes are combined into gangs:
    whole nodes, the largest first, and then the smallest node that covers the rest, whose remaining slots no other gang uses.

    Args:
        kinds: (number of nodes, slots of a node) for each kind of node.
    """
    gangs = [
        GangGroup(count * (each // ranks), ((kind, ranks),))
        for kind, (count, each) in enumerate(kinds)
        if count and each >= ranks
    ]
    free = {kind: count for kind, (count, each) in enumerate(kinds) if count and 0 < each < ranks}
    order = sorted(free, key=lambda kind: (-kinds[kind][1], kind))
    while sum(count * kinds[kind][1] for kind, count in free.items()) >= ranks:
        whole: dict[int, int] = {}
        missing = ranks
        for kind in order:
            whole[kind] = min(free[kind], missing // kinds[kind][1])
            missing -= whole[kind] * kinds[kind][1]
        assigned = [(kind, kinds[kind][1]) for kind, count in whole.items() for _ in range(count)]
        if missing:
            # Every node that was passed over has more slots than were missing then.
            rest = min((kind for kind in order if free[kind] > whole[kind]), key=lambda kind: (kinds[kind][1], kind))
            assigned.append((rest, missing))
            whole[rest] += 1
        # The same combination of nodes repeats until one kind of node runs out, so the loop runs once per kind instead of once
        # per gang.
        times = min(free[kind] // count for kind, count in whole.items() if count)
        gangs.append(GangGroup(times, tuple(sorted(assigned))))
        free = {kind: count - times * whole[kind] for kind, count in free.items()}
    return gangs


def count_gangs(kinds: Sequence[tuple[int, int]], ranks: int) -> int:
    """Return how many gangs of `ranks` fit."""
    return sum(group.times for group in assign_gangs(kinds, ranks))


def placement(kinds: Sequence[tuple[str, int, int]], ranks: int, num_gangs: int, *, unit: str, bound: str = "") -> Placement:
    """Describe where `num_gangs` gangs are, what is left over, and why.

    Args:
        kinds: (description, number of nodes, slots of a node) for each kind of node.
        bound: Why there are no more gangs although there is room.
    """
    room = assign_gangs([(count, each) for _, count, each in kinds], ranks)
    gangs = _first(room, num_gangs)
    inside, spanning = Counter[int](), Counter[int]()
    for times, nodes_of_one in gangs:
        for kind, num_ranks in nodes_of_one:
            (inside if len(nodes_of_one) == 1 else spanning)[kind] += times * num_ranks
    nodes = tuple(
        NodeSlots(
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
        why = bound if num_gangs < sum(group.times for group in room) else f"no further gang of {ranks} fits"
        sentences.append(f"{left} of {total} {unit}s {'is' if left == 1 else 'are'} left over: {why}")
    return Placement(
        unit=unit,
        ranks=ranks,
        num_gangs=sum(group.times for group in gangs),
        num_spanning=sum(group.times for group in gangs if len(group.nodes) > 1),
        nodes=nodes,
        sentences=tuple(sentences),
    )


def _first(room: Sequence[GangGroup], num_gangs: int) -> list[GangGroup]:
    taken: list[GangGroup] = []
    for group in room:
        times = min(group.times, num_gangs)
        num_gangs -= times
        if times:
            taken.append(group._replace(times=times))
    return taken


def _where(gangs: Sequence[GangGroup], ranks: int, num_nodes: int, unit: str) -> str:
    """Return a sentence such as `4 gangs of 8 GPUs, each inside one node`."""
    count = sum(group.times for group in gangs)
    sentence = f"{count} gang{'s' if count != 1 else ''} of {ranks} {unit}{'s' if ranks != 1 else ''}"
    if num_nodes == 1:
        return f"{sentence} on one node"
    spans = sorted({len(group.nodes) for group in gangs})
    if spans == [1]:
        return f"{sentence}, each inside one node"
    over = f"{spans[0]}" if len(spans) == 1 else f"{spans[0]} to {spans[-1]}"
    return (
        f"{sentence}, {'each ' if count > 1 else ''}over {over} nodes: no single node is large enough for one"
        if spans[0] > 1
        else (f"{sentence}, within one node where it fits, else over up to {spans[-1]} whole nodes")
    )
