"""Trials and controls, and the work that trains and evaluates them."""

from __future__ import annotations

import math
from typing import Literal, Required, TypedDict, Unpack

from orchestrator.anatomy import LayerSelection, ModelAnatomy, select, select_everything
from orchestrator.plan.search_space import head_rates
from orchestrator.plan.values import RunPlan, SweepPlan, TrialOption
from orchestrator.spec import learning_rate_range
from orchestrator.spec.adapters import PLAIN_LORA
from orchestrator.spec.models import JobSpec, SearchSpec
from orchestrator.values import content_hash
from orchestrator.work.assignment import EvaluateBase, TrainRung, WorkContext
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.remedies import NOTHING
from orchestrator.work.trial import TrialSpec

FOLLOW_UP_CONTROLS = ("shuffled", "scratch", "repeat")
"""Controls that are trained once the winner is known, for comparison with the bundle."""
CONTROL_NUMBERS = {"none": -5, "head": -4, "shuffled": -3, "scratch": -2, "repeat": -1, "curve": -1}
"""Controls are numbered before the searched trials, which count from 0."""
REPEAT = "repeat-"
"""Prefix of the name that a repeat of the winner from another seed has beside the bundle; its number follows."""


def make_trial(
    plan: RunPlan,
    option: TrialOption,
    learning_rate: float,
    number: int,
    seed: int,
    control: Literal["none", "head", "shuffled"] | None = None,
) -> TrialSpec:
    """Return a trial of the search. Its id, `t007-3fa2c1`, ends in a hash of all that determines its numbers except the data."""
    identity: dict[str, object] = {
        "layers": option.layers,
        "tune": option.tune,
        "lora_rank": option.lora_rank,
        "learning_rate": learning_rate.hex(),
        "seed": seed,
        "total_steps": plan.total_steps,
    }
    adapter = option.selection.adapter
    if adapter != PLAIN_LORA:
        identity["adapter"] = adapter.model_dump(mode="json", exclude_defaults=True)
    if option.remedies != NOTHING:
        identity["remedies"] = option.remedies.model_dump(mode="json")
    return TrialSpec(
        trial_id=control or f"t{number:03d}-{content_hash(identity)[:6]}",
        number=number,
        control=control,
        layers=option.layers,
        tune=option.tune,
        learning_rate=learning_rate,
        lora_rank=option.lora_rank,
        adapter=adapter,
        total_steps=plan.total_steps,
        total_tokens=option.remedies.total_tokens(plan.total_tokens),
        seed=seed,
        remedies=option.remedies,
    )


def none_control(plan: RunPlan, anatomy: ModelAnatomy, seed: int) -> tuple[TrialSpec, LayerSelection]:
    """Return the base model as a control, which is only evaluated; for a classifier that is the class prior."""
    selection = _select(plan, anatomy, "none")
    return _control(plan, "none", selection, 0.0, seed), selection


def head_control(plan: RunPlan, anatomy: ModelAnatomy, spec: JobSpec, seed: int) -> tuple[TrialSpec, LayerSelection]:
    """Return the feature-extraction control: only the head is trainable, at the geometric mean of its learning-rate range."""
    selection = _select(plan, anatomy, "head")
    low, high = head_rates(spec.search or SearchSpec(), spec.task)
    return _control(plan, "head", selection, math.sqrt(low * high), seed), selection


def shuffled_control(winner: TrialSpec) -> TrialSpec:
    """Return the winner to be trained on answers permuted among the prompts: the gain from style only."""
    trial_id = follow_up_id("shuffled", winner.trial_id)
    update = {"trial_id": trial_id, "number": CONTROL_NUMBERS["shuffled"], "control": "shuffled"}
    return winner.model_copy(update=update)


def scratch_control(plan: RunPlan, anatomy: ModelAnatomy, spec: JobSpec, winner: TrialSpec) -> tuple[TrialSpec, LayerSelection]:
    """Return the control with random weights, all trainable, on the winner's documents for as many steps.

    It uses the highest rate that the search tries for full fine-tuning: a new model takes a higher one than a trained one.
    """
    selection = select_everything(anatomy, task=plan.base.task, num_classes=plan.base.num_classes)
    _, high = learning_rate_range(spec.search or SearchSpec(), "full")
    trial = _control(plan, "scratch", selection, high, winner.seed)
    return trial.model_copy(update={"trial_id": follow_up_id("scratch", winner.trial_id)}), selection


def repeat_control(winner: TrialSpec, number: int) -> TrialSpec:
    """Return the winner to be trained from another seed: another order of the documents, other initial adapters.

    Args:
        number: From 2 on; the winner itself is the first.
    """
    update = {
        "trial_id": follow_up_id(f"{REPEAT}{number}", winner.trial_id),
        "number": CONTROL_NUMBERS["repeat"],
        "control": "repeat",
        "seed": winner.seed + number - 1,
    }
    return winner.model_copy(update=update)


def curve_trial(winner: TrialSpec, share: float, total_steps: int, target_tokens: int) -> TrialSpec:
    """Return the winner to be trained on a share of the training documents with its own schedule: a point of the learning
    curve.

    Args:
        total_steps: Steps for as many epochs as the winner's, over the share.
        target_tokens: Tokens for the same epochs, without replayed ones.
    """
    update = {
        "trial_id": curve_trial_id(share, winner.trial_id),
        "number": CONTROL_NUMBERS["curve"],
        "control": "curve",
        "share": share,
        "total_steps": total_steps,
        "total_tokens": winner.remedies.total_tokens(target_tokens),
    }
    return winner.model_copy(update=update)


def follow_up_controls(plan: RunPlan, winner_id: str) -> dict[str, str]:
    """Return the ids of the controls to train once this winner is known, by the name that each has beside the bundle."""
    if not isinstance(plan, SweepPlan):
        return {}
    fitting = {"shuffled": True, "scratch": plan.scratch_memory is not None}
    names = [name for name, fits in fitting.items() if fits and name in plan.search.controls]
    names += [f"{REPEAT}{number}" for number in range(2, plan.search.repeats + 1)]
    return {name: follow_up_id(name, winner_id) for name in names}


def curve_trial_id(share: float, winner_id: str) -> str:
    """Return the id of a point of the learning curve; see `follow_up_id`."""
    return follow_up_id(f"curve-{share:g}", winner_id)


def follow_up_id(name: str, winner_id: str) -> str:
    """Return the id of a control that is trained once the winner is known.

    It names the winner, since an extended sweep may have another one.
    """
    return f"{name}-{winner_id}"


def work_context(
    plan: RunPlan, *, settings: TrainSettings, data: DataPaths, metric: str, execution: ExecutionPlan | None = None
) -> WorkContext:
    """Return what all work shares that is run by one kind of gang.

    Args:
        execution: The gang's execution if it differs from the search's: the refit's gang is alone if it has other ranks.
    """
    alone = execution is not None and execution.ranks != plan.execution.ranks
    return WorkContext(
        settings=settings,
        data=data,
        metric=metric,
        trunk=plan.trunk,
        largest_memory_bytes=max((option.memory.total_bytes for option in plan.options), default=None),
        num_gangs=1 if alone else plan.num_gangs,
        spec_sha256=plan.spec_sha256,
        base_sha256=plan.base_sha256,
    )


class RungFields(TypedDict, total=False):
    """Fields of a `TrainRung` that are neither the trial's nor the gang's."""

    folder: Required[str]
    stop_step: Required[int]
    rung: int
    start: str | None
    keep_optimizer: bool
    checkpoint_every_steps: int
    evaluate: bool


def train_rung(
    plan: RunPlan,
    context: WorkContext,
    trial: TrialSpec,
    selection: LayerSelection,
    *,
    execution: ExecutionPlan | None = None,
    **rung: Unpack[RungFields],
) -> TrainRung:
    """Return the work that carries `trial` to a step, by the plan's execution unless another is given.

    Args:
        rung: The remaining fields of `TrainRung`.
    """
    assert not selection.pending, "blocks are scored before anything is trained"
    execution = execution or plan.execution
    predicted = _predicted_memory_bytes(plan, trial, execution)
    return TrainRung(
        context=context, execution=execution, trial=trial, selection=selection, predicted_memory_bytes=predicted, **rung
    )


def evaluate_base(
    plan: RunPlan,
    context: WorkContext,
    control: TrialSpec,
    selection: LayerSelection,
    folder: str,
    execution: ExecutionPlan | None = None,
) -> EvaluateBase:
    """Return the work that scores the base model (see `none_control`)."""
    execution = execution or plan.execution
    predicted = _predicted_memory_bytes(plan, control, execution)
    return EvaluateBase(
        context=context, execution=execution, trial=control, selection=selection, folder=folder, predicted_memory_bytes=predicted
    )


def _predicted_memory_bytes(plan: RunPlan, trial: TrialSpec, execution: ExecutionPlan) -> int | None:
    """Return the plan's figure for a rank; None for another kind of gang than the plan's, and where the plan has no figure."""
    if execution.gang_kind != plan.execution.gang_kind:
        return None
    if trial.control == "none":
        return plan.base_memory.total_bytes
    if trial.control == "head" and plan.head_memory is not None:
        return plan.head_memory.total_bytes
    if trial.control == "scratch":
        return plan.scratch_memory.total_bytes if plan.scratch_memory is not None else None
    choice = (trial.layers, trial.method)
    found = (option for option in plan.options if (option.layers, option.method) == choice)
    return next((option.memory.total_bytes for option in found), None)


def _select(plan: RunPlan, anatomy: ModelAnatomy, policy: str) -> LayerSelection:
    return select(anatomy, policy, "full", None, task=plan.base.task, num_classes=plan.base.num_classes)


def _control(
    plan: RunPlan, name: Literal["none", "head", "scratch"], selection: LayerSelection, learning_rate: float, seed: int
) -> TrialSpec:
    return TrialSpec(
        trial_id=name,
        number=CONTROL_NUMBERS[name],
        control=name,
        layers=selection.policy,
        tune=selection.tune,
        learning_rate=learning_rate,
        total_steps=plan.total_steps,
        total_tokens=plan.total_tokens,
        seed=seed,
    )
