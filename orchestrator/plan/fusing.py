"""How many LoRA trials may share a batch: as many as the memory holds, where a batch of one leaves the processor waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.ladder import Load, misfit
from orchestrator.plan.memory.candidate import Way
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.placement import TRIALS_PER_GANG, RankRoom
from orchestrator.spec.tasks import METRICS
from orchestrator.work.assignment import TrainRung, Work
from orchestrator.work.execution import ExecutionPlan

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


TEACHER_FORCED = frozenset({"perplexity", *(name for name, metric in METRICS.items() if not metric.generated)})
"""Metrics that are read off the losses of given answers. Others need a text from each trial's own model."""
FuseKey = tuple[object, ...]
"""Equal for assignments that may share a batch."""


def fuse_key(assignment: Work, planned: ExecutionPlan, anatomy: ModelAnatomy) -> FuseKey | None:
    """What must be equal of assignments that share a batch; None for one that must run alone.

    Alone run the controls, whatever learns beside adapters of the blocks (a shared head takes one trial's positions at
    a time, and has no adapters of its own), evaluations and measurements, gangs of DeepSpeed, metrics that
    need a generated text, bases with dropout (masks would be drawn for all at once), and a trial whose memory use was
    reduced after it ran out.

    Args:
        assignment: What a gang is given.
        planned: How the plan has trials trained.
        anatomy: Of the base.
    """
    if not isinstance(assignment, TrainRung):
        return None
    trial, selection, execution = assignment.trial, assignment.selection, assignment.execution
    if trial.control is not None or trial.tune != "lora" or selection.trainable or anatomy.head_weight in selection.adapted:
        return None
    if anatomy.dropout or execution.executor != "torch" or execution != planned:
        return None
    if assignment.metric not in TEACHER_FORCED:
        return None
    return (
        selection.cut,
        trial.seed,
        trial.remedies.replay,
        assignment.rung,
        assignment.stop_step,
        execution,
        assignment.settings,
        assignment.data,
        assignment.metric,
        assignment.evaluate,
        assignment.trunk,
    )


def concurrent_trials(num_trials: int, num_gangs: int, max_fused: int) -> int:
    """Trials that are open at once: a full batch for each gang, and one more, which is started while the gang works.

    No more are started ahead, since a sampler that runs ahead learns late.
    """
    ahead = TRIALS_PER_GANG - 1
    return min(num_trials, num_gangs * (max_fused + ahead))
