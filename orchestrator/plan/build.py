"""Build the plan from the spec, the base, the data and the cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from orchestrator.anatomy import LayerSelection, ModelAnatomy, check_modules, select
from orchestrator.errors import BaseError, PlanError
from orchestrator.plan import schedule
from orchestrator.plan.cost import estimate as cost
from orchestrator.plan.cost.duration import planned_duration
from orchestrator.plan.encoder_decoder import check_encoder_decoder
from orchestrator.plan.estimates import MemoryEstimate
from orchestrator.plan.explain import rate_note, with_explanations
from orchestrator.plan.fusing import concurrent_trials, may_share, most_fused
from orchestrator.plan.gangs import (
    Arrangement,
    arrange,
    check_resources,
    execution_plan,
    head_warnings,
    refit_candidate,
    why_no_more_gangs,
    with_scratch,
)
from orchestrator.plan.ladder import Load
from orchestrator.plan.measurements import with_compiling, with_probe, with_scores, with_shift
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import Footprint, make_footprint, with_anchor
from orchestrator.plan.memory.quantized import NF4_BLOCK
from orchestrator.plan.placement import Machines, node_subsets
from orchestrator.plan.remedies import remedies_of_train, whole_adapters_anchor
from orchestrator.plan.schedule import curve_shares
from orchestrator.plan.search_space import Choice, adapter_asked, located_at, planned_points, search_choices
from orchestrator.plan.trunk import plan_trunk
from orchestrator.plan.values import ClusterDescription, DataSize, FinetunePlan, RunPlan, SearchPlan, SweepPlan, TrialOption
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
    resize: Callable[[schedule.StepSize], DataSize] | None = None,
) -> RunPlan:
    """Decide everything before anything runs.

    Args:
        scores: Scores of the blocks, if an earlier submission of the run measured them.
        resize: Returns the same data cut into steps of another size, so that `tokens_per_step: auto` fills the ranks of a gang;
            None if the step size is settled.

    Raises:
        SpecError: the spec has no section for the job.
        SelectionError: a policy matches nothing, or the spec asks what is not done with an encoder-decoder.
        BaseError: nf4 on a CPU cannot represent one of the base's matrices.
        PlanError: the job does not fit the cluster, or its single training run would exceed `max_gpu_hours`.
    """
    require_section(loaded, job)
    spec = loaded.spec
    check_encoder_decoder(loaded, anatomy, job)
    choices = _choices(loaded, anatomy, data, job)
    check_resources(spec.resources)
    # The whole cluster comes first: it wins ties, and its error is the one that is reported.
    whole, *parts = node_subsets(cluster, spec.resources)
    _check_quantizable(spec, anatomy, whole)

    def on(found: Machines) -> RunPlan:
        return _plan_on(found, loaded, anatomy, data, cluster, choices, job=job, spec_sha256=spec_sha256, scores=scores)

    plan = with_scores(_cheapest_plan(on, [whole, *parts]), spec, anatomy, scores)
    # The step size decides how many ranks a gang has, and with `auto` the ranks decide the step size: plan once for the data
    # alone, then again with a step that gives every rank a row.
    filling = schedule.filling_step(spec, data, plan.execution.ranks) if resize is not None else None
    if resize is None or filling is None:
        return plan
    return make_plan(loaded, anatomy, resize(filling), cluster, job=job, spec_sha256=spec_sha256, scores=scores)


def _cheapest_plan(on: Callable[[Machines], RunPlan], machines: Sequence[Machines]) -> RunPlan:
    """Return the plan that takes the least time; ties go to the plan with the most nodes, which comes first.

    Raises:
        PlanError: the job fits none of these machines; the reason reported is the one for the whole cluster.
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
    # Times are compared only if all are known. Without them the first plan that fits is taken, the one with the most nodes.
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
    spec, anchor = loaded.spec, whole_adapters_anchor(choice.remedies for choice in choices)
    load = Load(
        footprints=tuple(_footprint(spec, anatomy, data, choice.selection, choice.remedies.anchor) for choice in choices),
        row_tokens=schedule.row_tokens(spec, anatomy, data),
        tokens_per_step=schedule.tokens_per_step(spec, data),
        whole_adapters=anchor is not None,
        one_row=not anatomy.ways.pads,
    )
    num_trials = spec.search.num_trials if job == "sweep" and spec.search is not None else 1
    untouched, head = (_footprint(spec, anatomy, data, _control(policy, spec, anatomy, data)) for policy in ("none", "head"))
    # The controls `none` and `head` run on the trials' gangs, so their memory is estimated for the same candidate.
    gangs = arrange(head, found, loaded, load, num_trials, anchor=anchor, job=job)
    refit, fused = refit_candidate(found, spec, load, gangs), _most_fused(spec, anatomy, choices, load, gangs, found)
    options, room = _options(choices, load.footprints, gangs.candidate), found.room(gangs.candidate.ranks, gangs.num_gangs)
    shared: dict[str, Any] = {
        "name": spec.name,
        "spec_sha256": spec_sha256,
        "base": _base_load(spec, anatomy, data),
        "num_parameters": anatomy.num_parameters(),
        "data": data,
        "execution": execution_plan(gangs.candidate, found, gangs.num_gangs, spec, anatomy),
        "refit_execution": execution_plan(refit, found, 1, spec, anatomy),
        "num_gangs": gangs.num_gangs,
        "head_memory": estimate(head, gangs.candidate).device if job == "sweep" else None,
        "base_memory": estimate(untouched, gangs.candidate).device,
        "total_steps": schedule.total_steps(spec, data),
        "total_tokens": schedule.total_tokens(spec, data),
        "disk_bytes": 0,
        "gpu_hours": None,
        "reasons": (),
        "rejected": gangs.rejected,
        "warnings": head_warnings(head, gangs.candidate, load, room) if job == "sweep" else (),
        "placement": found.placement(gangs.candidate.ranks, gangs.num_gangs, why_no_more_gangs(spec.resources, num_trials)),
        "refit_placement": found.placement(refit.ranks, 1, "a step has rows for no more ranks"),
    }
    plan: RunPlan = (
        SweepPlan(**shared, search=_search_plan(spec, anatomy, data, options, gangs, fused))
        if job == "sweep"
        else FinetunePlan(**shared, finetune=options[0])
    )
    plan = with_scratch(plan, spec, anatomy, gangs.candidate, load, room)
    trunk, reason = plan_trunk(plan, spec, anatomy, cost.rate_of(found))
    plan = _with_costs(plan.model_copy(update={"trunk": trunk}), anatomy, found, spec, loaded.defaulted)
    _check_gpu_hours(plan, spec)
    plan = with_explanations(plan.model_copy(update={"notes": (*plan.notes, reason)}), spec, anatomy, found, cluster)
    # The measurements come last: each is limited to a share of the operations that were just estimated.
    plan = with_compiling(plan, spec, anatomy)
    return with_shift(with_probe(plan, spec, anatomy, gangs.candidate, room, are_scored=scores is not None), anatomy)


def _check_quantizable(spec: JobSpec, anatomy: ModelAnatomy, found: Machines) -> None:
    """Reject matrices that bitsandbytes 0.50.2 silently corrupts on a CPU: rows that end inside one of its blocks.

    Measured: matrices of 32, 96 or 160 columns dequantize to weights other than those that were quantized.

    Raises:
        BaseError: names the first such matrix.
    """
    if spec.base.quantize != "none" and anatomy.encoding:
        raise BaseError(
            f"the base is quantized already, in {anatomy.encoding}",
            where="base.quantize",
            expected="none: transformers decodes such a base to 16 bit when loading, and cannot quantize it again",
            remedy="base.quantize: none, or give the original weights",
        )
    if spec.base.quantize != "nf4" or found.device != "cpu":
        return
    for name in (name for block in anatomy.linears for name in block):
        width = anatomy.matrix_shape(name)[-1]
        if width % NF4_BLOCK:
            raise BaseError(
                f"nf4 on a CPU does not support {name}: {width} columns",
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
    with located_at(loaded.where("finetune.modules")):
        check_modules(anatomy, asked.modules)
    with located_at(loaded.where("finetune.layers")):
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


def _footprint(
    spec: JobSpec, anatomy: ModelAnatomy, data: DataSize, selection: LayerSelection, anchor: AnchorPlan | None = None
) -> Footprint:
    element_bytes = 2 if spec.train.dtype == "bfloat16" else 4
    return with_anchor(
        make_footprint(anatomy, selection, spec.base.quantize, element_bytes, num_classes=data.num_classes), anchor
    )


def _options(choices: Sequence[Choice], footprints: Sequence[Footprint], candidate: Candidate) -> tuple[TrialOption, ...]:
    needed = [estimate(footprint, candidate) for footprint in footprints]
    return tuple(
        TrialOption(
            layers=selection.policy,
            tune=selection.tune,
            lora_rank=selection.lora_rank,
            selection=selection,
            memory=memory.device,
            host_memory=memory.host if candidate.device == "cuda" else MemoryEstimate(terms=()),
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
        code_sha256=anatomy.code_sha256,
        pooling=anatomy.pooling,
        padding=data.padding,
    )


def _search_plan(
    spec: JobSpec,
    anatomy: ModelAnatomy,
    data: DataSize,
    options: tuple[TrialOption, ...],
    gangs: Arrangement,
    max_fused: int,
) -> SearchPlan:
    search, total_steps = spec.search, schedule.total_steps(spec, data)
    assert search is not None
    return SearchPlan(
        options=options,
        num_trials=search.num_trials,
        algorithm=search.algorithm,
        scheduler=search.scheduler,
        rung_steps=schedule.search_rungs(search, data, total_steps),
        total_steps=total_steps,
        reduction_factor=schedule.REDUCTION_FACTOR,
        patience=schedule.patience(search, data),
        concurrent_trials=concurrent_trials(search.num_trials, gangs.num_gangs, max_fused),
        max_fused=max_fused,
        controls=search.controls,
        curve_shares=curve_shares(data.train_documents) if search.learning_curve else (),
        repeats=schedule.num_repeats(search, data),
        points=planned_points(spec, anatomy, data.num_classes),
    )


def _most_fused(
    spec: JobSpec, anatomy: ModelAnatomy, choices: Sequence[Choice], load: Load, gangs: Arrangement, found: Machines
) -> int:
    """Return how many trials may share a batch, among those that train only adapters."""
    # Fused trials must give the same results to the last bit as alone, and dropout would draw one mask for all of them. Compiled
    # blocks would have to be compiled again for every set of fused trials.
    if anatomy.dropout or spec.resources.compile == "on":
        return 1
    alone = [
        footprint for choice, footprint in zip(choices, load.footprints, strict=True) if may_share(anatomy, choice.selection)
    ]
    # Trials with different cuts cannot share a batch (`fuse_key`).
    kinds = {(choice.selection.cut, choice.selection.trainable) for choice in choices if not choice.selection.adapter.dropout}
    room = found.room(gangs.candidate.ranks, gangs.num_gangs)
    return most_fused(alone, gangs.candidate, load, room, spec.resources.max_fused, num_kinds=len(kinds))


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
    """Reject a training run that would exceed `max_gpu_hours`. A sweep is not rejected: it ends at the limit with its best trial
    so far, but a single training run that is cut short has no usable result."""
    allowed = spec.resources.max_gpu_hours
    if isinstance(plan, SweepPlan) or allowed is None or plan.gpu_hours is None or plan.gpu_hours <= allowed:
        return
    raise PlanError(
        f"the training would take about {plan.gpu_hours:.3g} GPU-hours, and max_gpu_hours allows {allowed:g}",
        where="resources.max_gpu_hours",
        expected=f"at most {allowed:g}",
        remedy="fewer epochs, or a higher limit",
    )
