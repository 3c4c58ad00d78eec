"""From spec, base, data and machines to the plan: every number that a run uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from orchestrator.anatomy import LayerSelection, ModelAnatomy, select
from orchestrator.errors import BaseError, PlanError
from orchestrator.plan import schedule as few
from orchestrator.plan import schedule as steps
from orchestrator.plan.cost import estimate as cost
from orchestrator.plan.cost.duration import planned_duration
from orchestrator.plan.estimates import MemoryEstimate
from orchestrator.plan.explain import rate_note, with_remarks
from orchestrator.plan.fusing import concurrent_trials, most_fused
from orchestrator.plan.gangs import (
    Arrangement,
    arrange,
    check_resources,
    execution_plan,
    head_warnings,
    refit_way,
    why_no_more_gangs,
    with_scratch,
)
from orchestrator.plan.ladder import Load
from orchestrator.plan.measurements import with_compiling, with_probe, with_scores, with_shift
from orchestrator.plan.memory.candidate import Way
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import Footprint, weigh, with_anchor
from orchestrator.plan.memory.quantized import NF4_BLOCK
from orchestrator.plan.placement import Machines, candidates
from orchestrator.plan.remedies import held_product, remedies_of_train
from orchestrator.plan.schedule import curve_shares
from orchestrator.plan.search_space import Choice, adapter_asked, planned_points, search_choices, told_at
from orchestrator.plan.trunk import plan_trunk
from orchestrator.plan.values import ClusterDescription, DataSize, RunPlan, SearchPlan, TrialOption
from orchestrator.spec import LoadedSpec, require_section
from orchestrator.spec.models import JobSpec
from orchestrator.work.execution import BaseLoad
from orchestrator.work.measurements import LayerScores
from orchestrator.work.remedies import AnchorPlan


def make_plan(
    loaded: LoadedSpec,
    anatomy: ModelAnatomy,
    data: DataSize,
    cluster: ClusterDescription,
    *,
    job: Literal["sweep", "finetune"],
    spec_sha256: str,
    scores: LayerScores | None = None,
    resize: Callable[[steps.StepSize], DataSize] | None = None,
) -> RunPlan:
    """Decide everything before anything runs.

    Args:
        scores: Of the blocks, where an earlier submission of the run has scored them.
        resize: The same data in steps of another size, so that `tokens_per_step: auto` fills the ranks of a gang; None where
            the size of a step is settled.

    Raises:
        SpecError: the spec has no section for the job.
        SelectionError: a policy that matches nothing.
        BaseError: a base whose widths nf4 cannot hold on a CPU.
        PlanError: the job does not fit the cluster, or its one training would use more GPU-hours than it may.
    """
    require_section(loaded, job)
    spec = loaded.spec
    choices = _choices(loaded, anatomy, data, job)
    check_resources(spec.resources)
    whole, *parts = candidates(cluster, spec.resources)
    _check_quantizable(spec, anatomy, whole)

    def on(found: Machines) -> RunPlan:
        return _plan_on(found, loaded, anatomy, data, cluster, choices, job=job, spec_sha256=spec_sha256, scores=scores)

    plan = with_scores(_cheapest_plan(on, [whole, *parts]), spec, anatomy, scores)
    filling = steps.filling_step(spec, data, plan.execution.ranks) if resize is not None else None
    if resize is None or filling is None:
        return plan
    return make_plan(loaded, anatomy, resize(filling), cluster, job=job, spec_sha256=spec_sha256, scores=scores)


def _cheapest_plan(on: Callable[[Machines], RunPlan], machines: Sequence[Machines]) -> RunPlan:
    """The plan that takes least time; of equals the one with most nodes, which comes first.

    Raises:
        PlanError: the job fits none; told is why it does not fit all.
    """
    plans: list[RunPlan] = []
    errors: list[PlanError] = []
    for found in machines:
        try:
            plans.append(on(found))
        except PlanError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    hours = [plan.cost.wall_hours if plan.cost is not None else None for plan in plans]
    known = [each for each in hours if each is not None]
    return plans[hours.index(min(known))] if len(known) == len(plans) else plans[0]


def _plan_on(
    found: Machines,
    loaded: LoadedSpec,
    anatomy: ModelAnatomy,
    data: DataSize,
    cluster: ClusterDescription,
    choices: Sequence[Choice],
    *,
    job: Literal["sweep", "finetune"],
    spec_sha256: str,
    scores: LayerScores | None,
) -> RunPlan:
    spec, held = loaded.spec, held_product(choice.remedies for choice in choices)
    load = Load(
        footprints=tuple(_weigh(spec, anatomy, data, choice.selection, choice.remedies.anchor) for choice in choices),
        row_tokens=steps.row_tokens(spec, anatomy, data),
        tokens_per_step=steps.tokens_per_step(spec, data),
        whole_adapters=held is not None,
    )
    num_trials = spec.search.num_trials if job == "sweep" and spec.search is not None else 1
    untouched, head = (_weigh(spec, anatomy, data, _control(policy, spec, anatomy, data)) for policy in ("none", "head"))
    gangs = arrange(head, found, loaded, load, num_trials, held=held, job=job)
    refit = refit_way(found, spec, load, gangs)
    options, room = _options(choices, load.footprints, gangs.way), found.room(gangs.way.ranks, gangs.num_gangs)
    pack, fused = steps.packs(spec), _most_fused(spec, anatomy, choices, load, gangs, found)
    plan = RunPlan(
        name=spec.name,
        spec_sha256=spec_sha256,
        base=_base_load(spec, anatomy, data),
        num_parameters=anatomy.num_parameters(),
        data=data,
        execution=execution_plan(gangs.way, found, gangs.num_gangs, spec, pack=pack),
        refit_execution=execution_plan(refit, found, 1, spec, pack=pack),
        num_gangs=gangs.num_gangs,
        head_memory=estimate(head, gangs.way).device if job == "sweep" else None,
        base_memory=estimate(untouched, gangs.way).device,
        search=_search_plan(spec, anatomy, data, options, gangs, fused) if job == "sweep" else None,
        finetune=options[0] if job == "finetune" else None,
        total_steps=steps.total_steps(spec, data),
        total_tokens=steps.total_tokens(spec, data),
        disk_bytes=0,
        gpu_hours=None,
        reasons=(),
        rejected=gangs.rejected,
        warnings=head_warnings(head, gangs.way, load, room) if job == "sweep" else (),
        placement=found.placement(gangs.way.ranks, gangs.num_gangs, why_no_more_gangs(spec.resources, num_trials)),
        refit_placement=found.placement(refit.ranks, 1, "a step has rows for no more ranks"),
    )
    plan = with_scratch(plan, spec, anatomy, gangs.way, load, room)
    trunk, reason = plan_trunk(plan, spec, anatomy, cost.rate_of(found))
    plan = _with_costs(plan.model_copy(update={"trunk": trunk}), anatomy, found, spec, loaded.defaulted)
    _check_gpu_hours(plan, spec)
    plan = with_remarks(plan.model_copy(update={"notes": (*plan.notes, reason)}), spec, anatomy, found, cluster)
    plan = with_compiling(plan, spec, anatomy)
    return with_shift(with_probe(plan, spec, anatomy, gangs.way, room, are_scored=scores is not None), anatomy)


def _check_quantizable(spec: JobSpec, anatomy: ModelAnatomy, found: Machines) -> None:
    """Refuse what bitsandbytes 0.50.2 gets wrong on a CPU, in silence: rows that end inside one of its blocks.

    Measured there: matrices of 32, 96 or 160 columns dequantize to other weights than they had.

    Raises:
        BaseError: names the first such matrix.
    """
    if spec.base.quantize != "nf4" or found.device != "cpu":
        return
    for name in (name for block in anatomy.linears for name in block):
        width = anatomy.tensors[name].shape[-1]
        if width % NF4_BLOCK:
            raise BaseError(
                f"nf4 on a CPU cannot hold {name}: {width} columns",
                where="base.quantize",
                expected=f"a multiple of {NF4_BLOCK}, bitsandbytes' block; its CPU code gives wrong results for other widths",
                remedy="base.quantize: none, or train on a GPU",
            )


def _choices(loaded: LoadedSpec, anatomy: ModelAnatomy, data: DataSize, job: Literal["sweep", "finetune"]) -> list[Choice]:
    if job == "sweep":
        return search_choices(loaded, anatomy, data.num_classes)
    asked = loaded.spec.finetune
    assert asked is not None, "the section was required"
    lora_rank = asked.lora_rank if asked.tune == "lora" else None
    with told_at(loaded.where("finetune.layers")):
        selection = select(
            anatomy,
            asked.layers,
            asked.tune,
            lora_rank,
            adapter=adapter_asked(asked),
            task=loaded.spec.task,
            num_classes=data.num_classes,
        )
    return [Choice(selection, (asked.learning_rate, asked.learning_rate), remedies_of_train(loaded.spec.train, asked.tune))]


def _control(policy: str, spec: JobSpec, anatomy: ModelAnatomy, data: DataSize) -> LayerSelection:
    return select(anatomy, policy, "full", None, task=spec.task, num_classes=data.num_classes)


def _weigh(
    spec: JobSpec, anatomy: ModelAnatomy, data: DataSize, selection: LayerSelection, anchor: AnchorPlan | None = None
) -> Footprint:
    element_bytes = 2 if spec.train.dtype == "bfloat16" else 4
    return with_anchor(weigh(anatomy, selection, spec.base.quantize, element_bytes, num_classes=data.num_classes), anchor)


def _options(choices: Sequence[Choice], footprints: Sequence[Footprint], way: Way) -> tuple[TrialOption, ...]:
    needed = [estimate(footprint, way) for footprint in footprints]
    return tuple(
        TrialOption(
            layers=selection.policy,
            tune=selection.tune,
            lora_rank=selection.lora_rank,
            selection=selection,
            memory=memory.device,
            host_memory=memory.host if way.device == "cuda" else MemoryEstimate(terms=()),
            learning_rate_low=low,
            learning_rate_high=high,
            remedies=remedies,
        )
        for (selection, (low, high), remedies), memory in zip(choices, needed, strict=True)
    )


def _base_load(spec: JobSpec, anatomy: ModelAnatomy, data: DataSize) -> BaseLoad:
    return BaseLoad(
        folder=anatomy.folder,
        model_type=anatomy.model_type,
        quantize=spec.base.quantize,
        task=spec.task,
        num_classes=data.num_classes,
        class_names=data.class_names,
        revision=spec.base.revision,
    )


def _search_plan(
    spec: JobSpec,
    anatomy: ModelAnatomy,
    data: DataSize,
    options: tuple[TrialOption, ...],
    gangs: Arrangement,
    max_fused: int,
) -> SearchPlan:
    search, total_steps = spec.search, steps.total_steps(spec, data)
    assert search is not None
    return SearchPlan(
        options=options,
        num_trials=search.num_trials,
        algorithm=search.algorithm,
        scheduler=search.scheduler,
        rung_steps=few.search_rungs(search, data, total_steps),
        total_steps=total_steps,
        reduction_factor=steps.REDUCTION_FACTOR,
        patience=few.patience(search, data),
        concurrent_trials=concurrent_trials(search.num_trials, gangs.num_gangs, max_fused),
        max_fused=max_fused,
        controls=search.controls,
        curve_shares=curve_shares(data.train_documents) if search.learning_curve else (),
        repeats=few.num_repeats(search, data),
        points=planned_points(spec, anatomy, data.num_classes),
    )


def _most_fused(
    spec: JobSpec, anatomy: ModelAnatomy, choices: Sequence[Choice], load: Load, gangs: Arrangement, found: Machines
) -> int:
    """How many trials may share a batch, of those whose choices are adapters alone."""
    if anatomy.dropout or spec.resources.compile == "on":
        return 1
    alone = [footprint for choice, footprint in zip(choices, load.footprints, strict=True) if not choice.selection.trainable]
    kinds = {(choice.selection.cut, choice.selection.trainable) for choice in choices}
    room = found.room(gangs.way.ranks, gangs.num_gangs)
    return most_fused(alone, gangs.way, load, room, spec.resources.max_fused, num_kinds=len(kinds))


def _with_costs(plan: RunPlan, anatomy: ModelAnatomy, found: Machines, spec: JobSpec, defaulted: str) -> RunPlan:
    rate = cost.rate_of(found)
    price = spec.resources.gpu_hour_price or found.gpu_hour_price
    estimated = cost.estimate_cost(plan, anatomy, rate, price_per_gpu_hour=price if found.device == "cuda" else None)
    base_bytes = anatomy.num_parameters() * (1 if spec.base.quantize != "none" else 2)
    core_flops = min(node.core_flops for node in found.nodes)
    estimated = estimated.model_copy(update={"duration": planned_duration(plan, estimated, base_bytes, core_flops)})
    return plan.model_copy(
        update={
            "cost": estimated,
            "disk_bytes": estimated.disk_bytes,
            "gpu_hours": estimated.gpu_hours,
            "notes": (*((defaulted,) if defaulted else ()), rate_note(rate)),
        }
    )


def _check_gpu_hours(plan: RunPlan, spec: JobSpec) -> None:
    """A sweep ends in order where its hours do, with the best trial so far. One training that is cut short is nothing."""
    allowed = spec.resources.max_gpu_hours
    if plan.search is not None or allowed is None or plan.gpu_hours is None or plan.gpu_hours <= allowed:
        return
    raise PlanError(
        f"the training would take about {plan.gpu_hours:.3g} GPU-hours, and max_gpu_hours allows {allowed:g}",
        where="resources.max_gpu_hours",
        expected=f"at most {allowed:g}",
        remedy="fewer epochs, or a higher bound",
    )
