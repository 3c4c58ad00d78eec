"""Find the cheapest candidate configuration of a gang that fits, and why cheaper ones do not.

Cost is GPU-seconds per trained token, and candidates are tried in this order:

1. nothing offloaded, then the optimizer offloaded, then the parameters: the bus is slower than any collective. DeepSpeed
   offloads only at ZeRO-3;
2. few ranks before many: ranks of one gang wait for each other, gangs do not;
3. without checkpointing before with it: recomputing the blocks costs up to 2kN operations in addition to 4N to 6N;
4. without DeepSpeed, with all trainable parameters on each rank, before ZeRO-1 before 2 before 3. Stages 0 to 2 communicate
   the same number of elements (Rajbhandari et al. 2020, section 7); without DeepSpeed no engine is built for each trial, and
   LoRA trials may share a batch. Stage 3 communicates half as much again, and on a frozen base far more than the gradients of
   LoRA;
5. the micro-batch is the largest that fits; a candidate is rejected if not even one row fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from orchestrator.plan.memory.candidate import Candidate, Device, Offload, Stage
from orchestrator.plan.memory.estimate import RankMemory, estimate
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.schedule import accumulation, max_rows
from orchestrator.plan.values import RejectedWay
from orchestrator.spec.models import ResourcesSpec
from orchestrator.units import format_bytes

OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
"""ZeRO stages; with `zero: auto` stage 0 means plain torch."""
OFFLOADING_STAGE: Stage = 3
"""The only stage at which DeepSpeed offloads anything."""


@dataclass(frozen=True)
class RankRoom:
    """Memory that one rank may fill."""

    device_bytes: int
    host_bytes: int
    """Its part of its node's memory, for what is offloaded, loaded and saved; on a CPU the device's own."""
    ranks_per_node: int = 1
    """Ranks that share a node's memory."""
    device_node: str = ""
    """The kind of node that limits the device memory, where nodes differ."""
    host_node: str = ""
    """The kind of node that limits the host memory, where nodes differ."""


RoomOf = Callable[[int], RankRoom]
"""The room of each rank, by the ranks of a gang: the more ranks a node has, the less of its memory has each."""


@dataclass(frozen=True)
class Load:
    """Training that a gang has to carry: the candidate must fit every footprint."""

    footprints: tuple[Footprint, ...]
    row_tokens: int
    tokens_per_step: int
    whole_adapters: bool = False
    """True if every rank must hold every adapter whole, as an anchor on LoRA products needs it; DeepSpeed partitions adapters
    across ranks."""
    one_row: bool = False
    """True if a micro-batch has one row, because none may be padded."""


def candidates(
    resources: ResourcesSpec, device: Device, rank_counts: Sequence[int], row_tokens: int, *, whole_adapters: bool = False
) -> Iterator[Candidate]:
    """Yield every candidate that the spec's `resources` allow, the cheapest first, with one row per micro-batch.

    Args:
        whole_adapters: As in `Load`; excludes candidates with DeepSpeed.
    """
    # The nesting of the loops is the order of cost in the module's docstring.
    for offload in _offloads(resources, device):
        for ranks in rank_counts:
            for checkpointing in (False, True):
                for stage in _stages(resources, ranks, offload):
                    # A stage that the spec gives is DeepSpeed's, 0 too; only `zero: auto` may choose plain torch.
                    executor = "torch" if resources.zero == "auto" and stage == 0 else "deepspeed"
                    if whole_adapters and executor == "deepspeed":
                        continue
                    yield Candidate(
                        device=device,
                        ranks=ranks,
                        executor=executor,
                        zero_stage=stage,
                        offload=offload,
                        checkpointing=checkpointing,
                        row_tokens=row_tokens,
                    )


def cheapest(candidates: Iterable[Candidate], load: Load, room_of: RoomOf) -> tuple[Candidate | None, list[RejectedWay]]:
    """Return the first candidate that fits, with its micro-batch, and the rejected ones before it, each with its largest term.

    Where nothing fits for some number of ranks, only the candidate with the least memory is listed for it.
    """
    refused: list[Candidate] = []
    for candidate in candidates:
        if shortage(candidate, load, room_of(candidate.ranks)) is None:
            return _with_rows(candidate, load, room_of(candidate.ranks)), _rejections(refused, candidate, load, room_of)
        refused.append(candidate)
    return None, _rejections(refused, None, load, room_of)


def leanest(candidates: Iterable[Candidate], load: Load) -> Candidate:
    """Return the candidate that needs the least memory on a rank's device."""
    return min(candidates, key=lambda candidate: heaviest(candidate, load.footprints).device.total_bytes)


def heaviest(candidate: Candidate, footprints: Sequence[Footprint]) -> RankMemory:
    """Return the largest need on the device over the footprints, and the largest need on the host."""
    estimates = [estimate(footprint, candidate) for footprint in footprints]
    return RankMemory(
        device=max((memory.device for memory in estimates), key=lambda memory: memory.total_bytes),
        host=max((memory.host for memory in estimates), key=lambda memory: memory.total_bytes),
        first_rank_bytes=max(memory.first_rank_bytes for memory in estimates),
    )


def shortage(candidate: Candidate, load: Load, room: RankRoom) -> str | None:
    """Return why a candidate does not fit, or None if it fits."""
    memory = heaviest(candidate, load.footprints)
    if memory.device.total_bytes > room.device_bytes:
        worst = max(memory.device.terms, key=lambda term: term.num_bytes)
        return (
            f"needs {format_bytes(memory.device.total_bytes)} of {format_bytes(room.device_bytes)} per rank"
            f"{_on(room.device_node)}, mostly {worst.name}: {format_bytes(worst.num_bytes)} ({worst.reason})"
        )
    # Only the first rank of a gang gathers the trainable weights to save them: its extra memory is shared out over the ranks of
    # the gang that are on its node.
    host_bytes = memory.host.total_bytes + memory.first_rank_bytes // min(candidate.ranks, room.ranks_per_node)
    if candidate.device == "cuda" and host_bytes > room.host_bytes:
        worst = max(memory.host.terms, key=lambda term: term.num_bytes)
        return (
            f"needs {format_bytes(host_bytes)} of host memory, and a rank has {format_bytes(room.host_bytes)}"
            f"{_on(room.host_node)}; "
            f"{worst.name}: {format_bytes(worst.num_bytes)} ({worst.reason})"
        )
    return None


def _on(node: str) -> str:
    return f" on a node of {node}" if node else ""


def _rejections(refused: Sequence[Candidate], taken: Candidate | None, load: Load, room_of: RoomOf) -> list[RejectedWay]:
    listed: list[Candidate] = []
    for at, same in groupby(refused, key=lambda candidate: (candidate.offload, candidate.ranks)):
        group = list(same)
        listed += group if taken and at == (taken.offload, taken.ranks) else [leanest(group, load)]
    return [
        RejectedWay(way=str(candidate), reason=shortage(candidate, load, room_of(candidate.ranks)) or "") for candidate in listed
    ]


def _with_rows(candidate: Candidate, load: Load, room: RankRoom) -> Candidate:
    """Return the candidate with the most rows that fit, distributed evenly over the rounds of a step. One row is known to fit."""
    # Memory grows with the number of rows, so the largest number that fits is found by bisection.
    most = max_rows(load.row_tokens, candidate.ranks, load.tokens_per_step, candidate.device)
    low, high = 1, 1 if load.one_row else most
    while low < high:
        middle = (low + high + 1) // 2
        if shortage(replace(candidate, micro_batch_rows=middle), load, room) is None:
            low = middle
        else:
            high = middle - 1
    rounds = accumulation(low, load.row_tokens, candidate.ranks, load.tokens_per_step)
    # Rows are spread evenly over the rounds: a larger micro-batch would need memory without saving a round.
    even = math.ceil(load.tokens_per_step / (load.row_tokens * candidate.ranks * rounds))
    return replace(candidate, micro_batch_rows=min(low, even))


def _offloads(resources: ResourcesSpec, device: Device) -> tuple[Offload, ...]:
    if resources.offload != "auto":
        return (resources.offload,)
    # Without a GPU device and host memory are the same, so there is nothing to gain from offloading.
    return ("none",) if device == "cpu" or resources.zero not in ("auto", OFFLOADING_STAGE) else OFFLOADS


def _stages(resources: ResourcesSpec, ranks: int, offload: Offload) -> tuple[Stage, ...]:
    if resources.zero != "auto":
        return (resources.zero,) if offload == "none" or resources.zero == OFFLOADING_STAGE else ()
    if offload != "none":
        return (OFFLOADING_STAGE,)
    # One rank has no other ranks to share its state with, so all stages would be equivalent.
    return (0,) if ranks == 1 else STAGES
