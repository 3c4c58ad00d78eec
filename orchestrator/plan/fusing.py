"""Number of LoRA trials that may share a batch: as many as memory allows, if a batch of one trial leaves the processor idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.ladder import Load, shortage
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.footprint import Footprint
from orchestrator.plan.placement import TRIALS_PER_GANG, RankRoom
from orchestrator.spec.tasks import metric_facts
from orchestrator.work.assignment import TrainRung, Work
from orchestrator.work.execution import ExecutionPlan

MAX_FUSED = 8
"""Largest fused batch size, in trials, that `resources.max_fused: auto` considers."""
FULL_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Micro-batch tokens above which a larger batch gains nothing. On a core, measured on a base of 7 million parameters
(`scripts/bench sweep fused`): in a batch of 8 a trial's step takes 0.54 of its time alone at 108 tokens, 0.76 at 417 and 1.0
from 751 up. On a GPU: assumed. A gang measures which fused batch size pays off before it uses one; this value limits how far
the search runs ahead for it."""


def most_fused(
    footprints: Sequence[Footprint],
    candidate: Candidate,
    load: Load,
    room: RankRoom,
    asked: int | Literal["auto"] = "auto",
    *,
    num_kinds: int = 1,
) -> int:
    """Return the largest power of two of trials whose batch fits in memory and can pay off; 1 if none can be fused.

    Args:
        footprints: Footprints of the choices that train only LoRA adapters.
        candidate: How a gang trains one trial.
        load: Rows and steps of the job.
        room: Memory of one rank.
        asked: The spec's limit, used even where it does not pay off; `auto` takes only sizes that can pay off.
        num_kinds: Number of kinds of choices that cannot share a batch with each other. To fill batches of every kind the search
            would have to run ahead that many times as far, and its sampler would see results late; so they divide the size.
    """
    if not footprints or candidate.executor != "torch":
        return 1
    most = (
        min(MAX_FUSED, FULL_TOKENS[candidate.device] // candidate.micro_batch_tokens) // num_kinds if asked == "auto" else asked
    )
    width = 1
    while 2 * width <= most:
        # Each fused trial brings its own rows, and its own adapters with their gradients and optimizer state.
        wider = replace(candidate, micro_batch_rows=2 * width * candidate.micro_batch_rows)
        fused = tuple(replace(footprint, learning_counts=footprint.learning_counts * 2 * width) for footprint in footprints)
        if shortage(wider, replace(load, footprints=fused), room) is not None:
            break
        width *= 2
    return width


def may_share(anatomy: ModelAnatomy, selection: LayerSelection) -> bool:
    """Return whether what is selected can be trained in a batch with other trials, to the same bits as alone.

    Not with routed experts: measured on a CPU in float32, products of one to three rows change their last bits where there are
    more, and experts get few rows.
    """
    return anatomy.experts is None and not (selection.trainable or selection.adapter.dropout)


FuseKey = tuple[object, ...]
"""Key that is equal for assignments that may share a batch."""


def fuse_key(assignment: Work, planned: ExecutionPlan, anatomy: ModelAnatomy) -> FuseKey | None:
    """Return what must be equal for assignments to share a batch; None for an assignment that must run alone.

    These run alone: controls; trials that train anything besides adapters of the blocks (a shared head takes the positions of one
    trial at a time, and has no adapters of its own); a base with routed experts (`may_share`); evaluations and measurements;
    gangs of DeepSpeed; metrics that need generated text; dropout in the base or in the adapters (masks would be drawn for all
    trials at once); and a trial that was reduced to less memory than planned.

    Args:
        assignment: What a gang is asked to do.
        planned: The planned execution of trials.
        anatomy: Anatomy of the base.
    """
    if not isinstance(assignment, TrainRung):
        return None
    trial, selection, execution = assignment.trial, assignment.selection, assignment.execution
    # The objective passes the head one trial's positions at a time, so an adapted head would apply adapters to the wrong trial.
    if trial.control is not None or trial.tune != "lora" or anatomy.head_weight in selection.adapted:
        return None
    if not may_share(anatomy, selection):
        return None
    # `execution != planned`: a trial that ran out of memory before keeps its smaller micro-batch, and must not lose it in a
    # batch.
    if anatomy.dropout or execution.executor != "torch" or execution != planned:
        return None
    if metric_facts(assignment.metric).generated:  # the text is generated by each trial's own model
        return None
    return (
        selection.cut,
        trial.seed,
        trial.remedies.shared_in_batch,
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
    """Return how many trials are open at once: a full batch for each gang, and one more that starts while the gang works.

    No more are started ahead, because a sampler that runs ahead sees results late.
    """
    ahead = TRIALS_PER_GANG - 1
    return min(num_trials, num_gangs * (max_fused + ahead))
