"""How many LoRA trials may share a batch: as many as the memory holds, where a batch of one leaves the processor waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.plan.ladder import Load, misfit
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.memory.way import Way
from orchestrator.plan.placement import RankRoom

MOST = 8
FULL_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens in flight beyond which a wider batch gains nothing. On a core: measured on a base of 7 million parameters, a step
in a batch of 8 takes 0.54 of its time alone at 108 tokens, 0.76 at 417 and 1.0 from 751 up (`scripts/bench sweep fused`). On a
GPU: assumed. A gang measures what really pays before it uses a width, and this bounds how far the search runs ahead for it."""


def most_fused(
    footprints: Sequence[Footprint],
    way: Way,
    load: Load,
    room: RankRoom,
    asked: int | Literal["auto"] = "auto",
    *,
    num_kinds: int = 1,
) -> int:
    """The largest power of two of trials whose batch fits and is not wider than what can pay; 1 where none shares.

    Args:
        footprints: Of the choices that are LoRA alone.
        way: How a gang trains one trial.
        load: Rows and steps of the job.
        room: Of one rank.
        asked: At most so many, whether that can pay or not.
        num_kinds: Kinds of choices that cannot share a batch with each other. To fill batches of every kind the search would
            run ahead so many times as far, and its sampler learn late: they divide what can pay.
    """
    if not footprints or way.executor != "torch":
        return 1
    most = min(MOST, FULL_TOKENS[way.device] // way.micro_batch_tokens) // num_kinds if asked == "auto" else asked
    width = 1
    while 2 * width <= most:
        wider = replace(way, micro_batch_rows=2 * width * way.micro_batch_rows)
        held = tuple(replace(footprint, learning_counts=footprint.learning_counts * 2 * width) for footprint in footprints)
        if misfit(wider, replace(load, footprints=held), room) is not None:
            break
        width *= 2
    return width
