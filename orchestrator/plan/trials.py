"""Trials, controls and the assignments that carry them."""

from __future__ import annotations

import math
from typing import Literal

from orchestrator.anatomy import LayerSelection, ModelAnatomy, select, select_everything
from orchestrator.plan.cost.choices import planned_options
from orchestrator.plan.search_space import head_rates
from orchestrator.plan.values import RunPlan, TrialOption
from orchestrator.spec import learning_rate_range
from orchestrator.spec.adapters import PLAIN_LORA
from orchestrator.spec.models import JobSpec, SearchSpec
from orchestrator.values import content_hash
from orchestrator.work.assignment import Assignment
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.measurements import CompilePlan, ProbePlan, ShiftPlan
from orchestrator.work.memory_ladder import SAME_GANG
from orchestrator.work.remedies import NOTHING
from orchestrator.work.trial import TrialSpec

LATE_CONTROLS = ("shuffled", "scratch", "repeat")
"""Controls that are trained once the winner is known, to stand beside what is bundled."""
CONTROL_NUMBERS = {"none": -5, "head": -4, "shuffled": -3, "scratch": -2, "repeat": -1, "curve": -1}
"""Controls stand before the searched trials, which count from 0."""
REPEAT = "repeat-"
"""How the name begins, beside the bundle, of the winner from another seed; its number follows."""
PROBE = "probe"
"""The name of the work that scores the blocks. It is the untouched base's, and no trial: nothing of it is in the ledger."""


SHIFT = "shift"
"""Likewise, of the work that measures the domain shift."""
COMPILE = "compile"
"""Likewise, of the work that measures compiled blocks."""


def make_trial(
    plan: RunPlan,
    option: TrialOption,
    learning_rate: float,
    number: int,
    seed: int,
    control: Literal["none", "head", "shuffled"] | None = None,
) -> TrialSpec:
    """A point of the search. Its id, `t007-3fa2c1`, ends in a hash over all that decides its numbers but the data."""
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
    """The untouched base; to classify, the class prior. It is only evaluated."""
    selection = _select(plan, anatomy, "none")
    return _control(plan, "none", selection, 0.0, seed), selection


def probe_trial(plan: RunPlan, anatomy: ModelAnatomy, seed: int) -> tuple[TrialSpec, LayerSelection]:
    """The untouched base once more, to be scored block by block."""
    trial, selection = none_control(plan, anatomy, seed)
    return trial.model_copy(update={"trial_id": PROBE, "number": CONTROL_NUMBERS["none"] - 1}), selection


def shift_trial(plan: RunPlan, anatomy: ModelAnatomy, seed: int) -> tuple[TrialSpec, LayerSelection]:
    """The untouched base once more, to be compared on two sets."""
    trial, selection = none_control(plan, anatomy, seed)
    return trial.model_copy(update={"trial_id": SHIFT, "number": CONTROL_NUMBERS["none"] - 3}), selection


def compile_trial(plan: RunPlan, option: int, seed: int) -> TrialSpec:
    """A choice of the search, to be measured with and without compiled blocks. A control, so that nothing holds it back."""
    assert plan.search is not None
    found = plan.search.options[option]
    trial = make_trial(plan, found, found.learning_rate_low, CONTROL_NUMBERS["none"] - 2, seed, "none")
    return trial.model_copy(update={"trial_id": COMPILE})


def head_control(plan: RunPlan, anatomy: ModelAnatomy, spec: JobSpec, seed: int) -> tuple[TrialSpec, LayerSelection]:
    """Feature extraction: only the head learns, at the middle (geometric mean) of its learning-rate range."""
    selection = _select(plan, anatomy, "head")
    low, high = head_rates(spec.search or SearchSpec(), spec.task)
    return _control(plan, "head", selection, math.sqrt(low * high), seed), selection


def shuffled_control(winner: TrialSpec) -> TrialSpec:
    """The winner once more, to be trained on answers permuted among the prompts: what style alone buys."""
    trial_id = late_control_id("shuffled", winner.trial_id)
    update = {"trial_id": trial_id, "number": CONTROL_NUMBERS["shuffled"], "control": "shuffled"}
    return winner.model_copy(update=update)


def scratch_control(plan: RunPlan, anatomy: ModelAnatomy, spec: JobSpec, winner: TrialSpec) -> tuple[TrialSpec, LayerSelection]:
    """Random weights, all of which learn from the winner's documents for as many steps, at the highest rate that the search
    tries for whole weights: a new model takes a higher one than a trained one."""
    selection = select_everything(anatomy, task=plan.base.task, num_classes=plan.base.num_classes)
    _, high = learning_rate_range(spec.search or SearchSpec(), "full")
    trial = _control(plan, "scratch", selection, high, winner.seed)
    return trial.model_copy(update={"trial_id": late_control_id("scratch", winner.trial_id)}), selection


def repeat_control(winner: TrialSpec, number: int) -> TrialSpec:
    """The winner's training once more from another seed: another order of the documents, other initial adapters.

    Args:
        number: From 2 on; the winner itself is the first.
    """
    update = {
        "trial_id": late_control_id(f"{REPEAT}{number}", winner.trial_id),
        "number": CONTROL_NUMBERS["repeat"],
        "control": "repeat",
        "seed": winner.seed + number - 1,
    }
    return winner.model_copy(update=update)


def curve_trial(winner: TrialSpec, share: float, total_steps: int, target_tokens: int) -> TrialSpec:
    """The winner once more, to be trained on a share of the training documents for a schedule of its own: a point of the
    learning curve.

    Args:
        total_steps: Of as many epochs as the winner's, over the share.
        target_tokens: Likewise, without what is replayed.
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


def late_controls(plan: RunPlan, winner_id: str) -> dict[str, str]:
    """Ids of the controls that are to be trained once this winner is known, by the name that each has beside the bundle."""
    if plan.search is None:
        return {}
    fitting = {"shuffled": True, "scratch": plan.scratch_memory is not None}
    names = [name for name, fits in fitting.items() if fits and name in plan.search.controls]
    names += [f"{REPEAT}{number}" for number in range(2, plan.search.repeats + 1)]
    return {name: late_control_id(name, winner_id) for name in names}


def curve_trial_id(share: float, winner_id: str) -> str:
    """As `late_control_id`."""
    return late_control_id(f"curve-{share:g}", winner_id)


def late_control_id(name: str, winner_id: str) -> str:
    """Of a control that is trained once the winner is known: its id names the winner, since an extended sweep may have
    another one."""
    return f"{name}-{winner_id}"


def make_assignment(
    plan: RunPlan,
    trial: TrialSpec,
    selection: LayerSelection,
    *,
    settings: TrainSettings,
    data: DataPaths,
    metric: str,
    folder: str,
    rung: int,
    start: str | None,
    stop_step: int,
    execution: ExecutionPlan | None = None,
    keep_optimizer: bool = True,
    checkpoint_every_steps: int = 0,
    evaluate: bool = True,
    probe: ProbePlan | None = None,
    compiling: CompilePlan | None = None,
    shift: ShiftPlan | None = None,
) -> Assignment:
    """All that a gang needs to carry `trial` to `stop_step`, by the plan's execution unless another is given.

    Args:
        folder: The trial's folder.
        start: The rung's folder to go on from; None starts at step 0.
        probe: Score the blocks instead of training.
        compiling: Measure what compiled blocks gain instead of training.
        shift: Measure how far the target lies from the retention set instead of training.
    """
    assert not selection.pending, "blocks are scored before anything is trained"
    return Assignment(
        trial=trial,
        spec_sha256=plan.spec_sha256,
        base_sha256=plan.base_sha256,
        selection=selection,
        execution=execution or plan.execution,
        settings=settings,
        data=data,
        metric=metric,
        folder=folder,
        rung=rung,
        start=start,
        stop_step=stop_step,
        keep_optimizer=keep_optimizer,
        checkpoint_every_steps=checkpoint_every_steps,
        evaluate=evaluate,
        trunk=plan.trunk if trial.control not in ("none", "scratch") or compiling is not None or shift is not None else None,
        predicted_memory_bytes=_predicted_memory_bytes(plan, trial, execution or plan.execution),
        largest_memory_bytes=max((option.memory.total_bytes for option in planned_options(plan)), default=None),
        num_gangs=plan.num_gangs if execution is None or execution.ranks == plan.execution.ranks else 1,
        probe=probe,
        compiling=compiling,
        shift=shift,
    )


def _predicted_memory_bytes(plan: RunPlan, trial: TrialSpec, execution: ExecutionPlan) -> int | None:
    """The plan's figure for a rank; None for another kind of gang than the plan's, and for what it did not weigh."""
    if any(getattr(execution, name) != getattr(plan.execution, name) for name in SAME_GANG):
        return None
    if trial.control == "none":
        return plan.base_memory.total_bytes
    if trial.control == "head" and plan.head_memory is not None:
        return plan.head_memory.total_bytes
    if trial.control == "scratch":
        return plan.scratch_memory.total_bytes if plan.scratch_memory is not None else None
    options = plan.search.options if plan.search is not None else (plan.finetune,) if plan.finetune is not None else ()
    choice = (trial.layers, trial.method)
    found = (option for option in options if (option.layers, option.method) == choice)
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
