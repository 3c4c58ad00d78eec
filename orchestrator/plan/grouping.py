"""Which trials may share a batch, and how many of them stand ready."""

from __future__ import annotations

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.placement import TRIALS_PER_GANG
from orchestrator.plan.values import Assignment, ExecutionPlan

TEACHER_FORCED = frozenset({"loss", "perplexity", "accuracy", "macro_f1"})
"""Metrics that are read off the losses of given answers. Others need a text from each trial's own model."""
FuseKey = tuple[object, ...]
"""Equal for assignments that may share a batch."""


def fuse_key(assignment: Assignment, planned: ExecutionPlan, anatomy: ModelAnatomy) -> FuseKey | None:
    """What must be equal of assignments that share a batch; None for one that must run alone.

    Alone run the controls, whatever learns beside adapters of the blocks (a shared head takes one trial's positions at
    a time, and has no adapters of its own), what is only evaluated, gangs of DeepSpeed, metrics that
    need a generated text, bases that drop out (masks would be drawn for all at once), and a trial that came down to
    less memory than was planned.

    Args:
        assignment: What a gang is to do.
        planned: How the plan has trials trained.
        anatomy: Of the base.
    """
    trial, selection, execution = assignment.trial, assignment.selection, assignment.execution
    if trial.control is not None or trial.tune != "lora" or selection.trainable or anatomy.head_weight in selection.adapted:
        return None
    if anatomy.dropout or execution.executor != "torch" or execution != planned:
        return None
    if assignment.stop_step == 0 or assignment.metric not in TEACHER_FORCED:
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
