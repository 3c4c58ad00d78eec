"""Decide how many gangs there are, how many ranks each has and how they run; explain why nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.anatomy import ModelAnatomy, select_everything
from orchestrator.errors import PlanError
from orchestrator.plan.ladder import OFFLOADING_STAGE, Load, RankRoom, RoomOf, candidates, cheapest, heaviest, shortage
from orchestrator.plan.memory.candidate import Candidate, Device
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import Footprint, make_footprint
from orchestrator.plan.placement import Machines
from orchestrator.plan.remedies import no_whole_adapters
from orchestrator.plan.schedule import packs
from orchestrator.plan.values import RejectedWay, RunPlan, SweepPlan
from orchestrator.spec import LoadedSpec
from orchestrator.spec.models import JobSpec, ResourcesSpec
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.remedies import AnchorPlan

QUANTIZABLE = ("frozen weights", "gathered weights")
"""Memory terms that shrink if the base is quantized."""


@dataclass(frozen=True)
class Arrangement:
    """The gangs, and the cheaper configurations that were rejected."""

    candidate: Candidate
    num_gangs: int
    rejected: tuple[RejectedWay, ...]


def arrange(
    head: Footprint,
    found: Machines,
    loaded: LoadedSpec,
    load: Load,
    num_trials: int,
    *,
    anchor: AnchorPlan | None,
    job: Literal["sweep", "finetune"],
) -> Arrangement:
    """Decide the job's gangs.

    Args:
        head: Footprint of a sweep's control `head`.
        anchor: The anchor because of which every rank must hold whole adapters.

    Raises:
        PlanError: nothing fits, or only DeepSpeed fits, which cannot hold such an anchor.
    """

    def arranged(load: Load) -> Arrangement:
        spec = loaded.spec
        return _arrange_beside(head, found, spec, load, num_trials) if job == "sweep" else arrange_one(found, spec, load)

    try:
        return arranged(load)
    except PlanError as unfit:
        if anchor is None:
            raise
        # If DeepSpeed does not fit either, this raises the error that says what is missing; the anchor is not to blame.
        arranged(replace(load, whole_adapters=False))
        raise no_whole_adapters(anchor, loaded, job, unfit) from None


def arrange_sweep(found: Machines, spec: JobSpec, load: Load, num_trials: int) -> Arrangement:
    """Return gangs that are as small as possible, and as many as the machines have room and the search has work for.

    Raises:
        PlanError: nothing fits.
    """
    if found.device == "cpu":
        return _arrange_cores(found, spec, load, num_trials)
    resources = spec.resources
    asked = 1 if resources.gangs == "auto" else resources.gangs
    counts = [n for n in found.rank_counts() if found.max_gangs(n) >= asked]
    if resources.ranks_per_gang != "auto":
        counts = [resources.ranks_per_gang]

    def gangs_of(ranks: int) -> int:
        return max(1, min(num_trials, found.max_gangs(ranks))) if resources.gangs == "auto" else resources.gangs

    def room_of(ranks: int) -> RankRoom:
        return found.room(ranks, gangs_of(ranks))

    candidate, rejected = cheapest(_candidates(resources, "cuda", counts, load), load, room_of)
    if candidate is None:
        raise _nothing_fits(found, spec, load, counts, room_of)
    return Arrangement(candidate, gangs_of(candidate.ranks), tuple(rejected))


def arrange_one(found: Machines, spec: JobSpec, load: Load) -> Arrangement:
    """Return one gang for one trial: on GPUs with as many ranks as a step has rows, on a CPU one process with every core.

    Raises:
        PlanError: nothing fits.
    """
    resources = spec.resources
    if resources.ranks_per_gang != "auto":
        counts = [resources.ranks_per_gang]
    elif found.device == "cpu":
        counts = [1]
    else:
        # A rank without a row in a step would idle, so the gang has at most as many ranks as a step has rows; larger gangs are
        # tried only if the model does not fit otherwise.
        useful = max(1, load.tokens_per_step // load.row_tokens)
        all_counts = found.rank_counts()
        most = max((n for n in all_counts if n <= useful), default=1)
        counts = [n for n in all_counts if n >= most]
    candidate, rejected = cheapest(_candidates(resources, found.device, counts, load), load, found.room_of_one)
    if candidate is None:
        raise _nothing_fits(found, spec, load, counts, found.room_of_one)
    return Arrangement(candidate, 1, tuple(rejected))


def refit_candidate(found: Machines, spec: JobSpec, load: Load, sweep: Arrangement) -> Candidate:
    """Return all the sweep's ranks in one gang, as far as a step has rows for them; else the sweep's own configuration."""
    useful = load.tokens_per_step // load.row_tokens
    gangs = max(1, min(sweep.num_gangs, useful // sweep.candidate.ranks))
    ranks = sweep.candidate.ranks * gangs
    if ranks == sweep.candidate.ranks:
        return sweep.candidate
    candidate, _ = cheapest(_candidates(spec.resources, found.device, [ranks], load), load, found.room_of_one)
    return candidate or sweep.candidate


def why_no_more_gangs(resources: ResourcesSpec, num_trials: int) -> str:
    """Explain why there are no more gangs although there is room for them."""
    if num_trials == 1:
        return "one trial runs in one gang"
    return f"{num_trials} trials keep no more gangs busy" if resources.gangs == "auto" else f"resources.gangs: {resources.gangs}"


def execution_plan(candidate: Candidate, found: Machines, num_gangs: int, spec: JobSpec, anatomy: ModelAnatomy) -> ExecutionPlan:
    """Return the candidate as the value that gangs receive."""
    return ExecutionPlan(
        device=candidate.device,
        ranks=candidate.ranks,
        threads_per_rank=found.threads(candidate.ranks * num_gangs),
        executor=candidate.executor,
        zero_stage=candidate.zero_stage,
        offload=candidate.offload,
        checkpointing=candidate.checkpointing,
        dtype=spec.train.dtype,
        row_tokens=candidate.row_tokens,
        micro_batch_rows=candidate.micro_batch_rows,
        pack=packs(spec, anatomy),
        pads=anatomy.ways.pads,
        backend="nccl" if candidate.device == "cuda" else "gloo",
        # Ray packs a gang strictly onto one node only if every gang of the plan fits inside a node.
        inside_node=found.placement(candidate.ranks, num_gangs, "").num_spanning == 0,
    )


def check_resources(resources: ResourcesSpec) -> None:
    """Reject a ZeRO stage that cannot offload what the spec requests.

    Raises:
        PlanError: `offload: optimizer` or `parameters` below stage 3.
    """
    offloads = resources.offload not in ("auto", "none")
    if offloads and resources.zero not in ("auto", OFFLOADING_STAGE):
        raise PlanError(
            f"ZeRO stage {resources.zero} cannot offload the {resources.offload}",
            where="resources.offload",
            expected=f"stage {OFFLOADING_STAGE}, the one that offloads",
            remedy="resources.zero: auto, or offload: none",
        )


def _arrange_beside(head: Footprint, found: Machines, spec: JobSpec, load: Load, num_trials: int) -> Arrangement:
    """Return gangs that can also train the control `head`, which is part of every sweep, if that costs no more than a smaller
    micro-batch or checkpointing; more expensive gangs are not chosen for a control."""
    alone = arrange_sweep(found, spec, load, num_trials)
    try:
        both = arrange_sweep(found, spec, replace(load, footprints=(*load.footprints, head)), num_trials)
    except PlanError:
        return alone
    # Micro-batch and checkpointing may differ between the two; everything that makes a gang more expensive may not.
    kinds = {
        (gangs.num_gangs, gangs.candidate.ranks, gangs.candidate.zero_stage, gangs.candidate.offload) for gangs in (alone, both)
    }
    return both if len(kinds) == 1 else alone


def _arrange_cores(found: Machines, spec: JobSpec, load: Load, num_trials: int) -> Arrangement:
    """Return gangs on CPUs, where all ranks share one memory, so that fewer gangs leave more room for each."""
    resources = spec.resources
    ranks = 1 if resources.ranks_per_gang == "auto" else resources.ranks_per_gang
    most = max(1, min(num_trials, found.max_gangs(ranks)))
    # From many gangs to few: with fewer gangs each rank gets a larger share of the memory.
    choices = range(most, 0, -1) if resources.gangs == "auto" else [resources.gangs]
    reason = ""
    for gangs in choices:
        room = found.room(ranks, gangs)
        candidate, rejected = cheapest(_candidates(resources, "cpu", [ranks], load), load, lambda _, room=room: room)
        if candidate is not None:
            fewer = (RejectedWay(way=_gangs(most, gangs + 1), reason=reason),) if gangs < choices[0] else ()
            return Arrangement(candidate, gangs, (*fewer, *rejected))
        reason = rejected[-1].reason if rejected else ""
    raise _nothing_fits(found, spec, load, [ranks], lambda _: found.room(ranks, choices[-1]))


def _candidates(resources: ResourcesSpec, device: Device, rank_counts: Sequence[int], load: Load) -> Iterator[Candidate]:
    return candidates(resources, device, rank_counts, load.row_tokens, whole_adapters=load.whole_adapters)


def _gangs(most: int, least: int) -> str:
    return f"{most} gangs" if most == least else f"{most} to {least} gangs"


def _nothing_fits(found: Machines, spec: JobSpec, load: Load, counts: Sequence[int], room_of: RoomOf) -> PlanError:
    """Return an error that says how much the smallest configuration exceeds the memory and what would help."""
    tried = list(_candidates(spec.resources, found.device, counts, load))
    assert tried, "the spec refuses products of adapters where resources ask for DeepSpeed"
    needed = {candidate: heaviest(candidate, load.footprints) for candidate in tried}
    # If some candidate fits the device, host memory is what is missing, and the candidate that needs the least of it shows by how
    # much.
    on_device = [
        candidate for candidate in tried if needed[candidate].device.total_bytes <= room_of(candidate.ranks).device_bytes
    ]
    if on_device:
        candidate = min(on_device, key=lambda candidate: needed[candidate].host.total_bytes)
        remedies = _host_remedies(room_of(candidate.ranks))
    else:
        candidate = min(tried, key=lambda candidate: needed[candidate].device.total_bytes)
        remedies = _device_remedies(found, spec, load, candidate)
    if any(footprint.learning_blocks for footprint in load.footprints):
        remedies.append("fewer layers (last:2), or tune: [lora]")
    if spec.resources.zero != "auto" or spec.resources.offload != "auto":
        remedies.append("resources.zero and resources.offload: auto")
    return PlanError(
        f"nothing fits on {found.num_units} {found.unit}{'s' if found.num_units > 1 else ''}; "
        f"the smallest configuration ({candidate}) {shortage(candidate, load, room_of(candidate.ranks))}",
        where="resources",
        remedy="; ".join(remedies),
    )


def _host_remedies(room: RankRoom) -> list[str]:
    """Return remedies for a device that has room while its node's host memory has not."""
    fewer = ["fewer ranks a node: a smaller resources.gangs or max_gpus"] if room.ranks_per_node > 1 else []
    return ["nodes with more host memory", *fewer]


def _device_remedies(found: Machines, spec: JobSpec, load: Load, candidate: Candidate) -> list[str]:
    """Return remedies for a device: quantizing if frozen weights dominate, shorter rows if activations matter."""
    terms = heaviest(candidate, load.footprints).device.terms
    remedies = [f"more or larger {found.unit}s" if found.device == "cuda" else "more memory"]
    if spec.base.quantize == "none" and max(terms, key=lambda term: term.num_bytes).name in QUANTIZABLE:
        remedies.append("base.quantize: nf4")
    elif spec.base.quantize != "none" and any(term.name == "loading" for term in terms):
        remedies.append("base.quantize: none, which ZeRO-3 partitions as it is loaded")
    if any(term.moving for term in terms):
        remedies.append("a smaller data.max_tokens")
    return remedies


def head_warnings(head: Footprint, candidate: Candidate, load: Load, room: RankRoom) -> tuple[str, ...]:
    """Warn if the control `head` does not fit even in the smallest configuration that its gang can fall back to."""
    reason = shortage(_smallest(candidate), replace(load, footprints=(head,)), room)
    warning = "the control `head` will run out of memory, and trials will be compared with the base model only"
    return () if reason is None else (f"{warning}: it {reason}",)


def with_scratch(
    plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, candidate: Candidate, load: Load, room: RankRoom
) -> RunPlan:
    """Return the plan with the memory of the control `scratch`, if the spec requests it; without it, with a warning, if the gangs
    that the trials need cannot train it."""
    if not isinstance(plan, SweepPlan) or "scratch" not in plan.search.controls:
        return plan
    selection = select_everything(anatomy, task=plan.base.task, num_classes=plan.base.num_classes)
    element_bytes = 2 if plan.execution.dtype == "bfloat16" else 4
    # `scratch` trains every parameter, so it can need far more memory than any trial; it must not change the gangs.
    footprint = make_footprint(anatomy, selection, spec.base.quantize, element_bytes, num_classes=plan.base.num_classes)
    reason = shortage(_smallest(candidate), replace(load, footprints=(footprint,)), room)
    if candidate.executor == "deepspeed" and candidate.zero_stage == 3:
        reason = "it cannot be initialised where each rank holds only a shard of the base (ZeRO-3)"
    if reason is not None:
        warning = f"the control `scratch` is left out: training everything {reason}"
        return plan.model_copy(update={"warnings": (*plan.warnings, warning)})
    return plan.model_copy(update={"scratch_memory": estimate(footprint, candidate).device})


def _smallest(candidate: Candidate) -> Candidate:
    """Return the configuration that a gang falls back to when it runs out of memory."""
    return replace(candidate, micro_batch_rows=1, checkpointing=True)
