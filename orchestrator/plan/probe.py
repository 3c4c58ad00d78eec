"""The probe in the plan: whether the blocks are scored, by how much data, and what the scores make of the plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from orchestrator.anatomy import LayerSelection, ModelAnatomy, select
from orchestrator.anatomy.selection import num_of_share
from orchestrator.errors import PlanError
from orchestrator.plan.cost.choices import option_terms, planned_options
from orchestrator.plan.ladder import RankRoom
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import weigh
from orchestrator.plan.memory.way import Way
from orchestrator.plan.scored import LayerScores, ProbePlan
from orchestrator.plan.trunk import plan_trunk
from orchestrator.plan.values import RunPlan, TrialOption
from orchestrator.spec.models import JobSpec
from orchestrator.spec.policy import parse_policy

MOST_BATCHES = 4
MOST_OF_A_TRIAL = 0.05
"""Operations of the probe, as a share of those of the cheapest trial."""
NOT_HELD = {
    "fp32 master weights",
    "Adam's moments",
    "copy for restoring the base",
    "host: copy for restoring the base",
    "host: loading or saving",
}
"""What training the same blocks holds and the probe does not: it has no optimizer and changes nothing."""


def with_probe(
    plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, way: Way, room: RankRoom, *, are_scored: bool = False
) -> RunPlan:
    """The plan with its probe, where there is one, and the reasons for it.

    Args:
        way: How the gang that runs it trains.
        room: Of each of its ranks.
        are_scored: Whether the run knows the scores: then these gangs need not be able to find them.

    Raises:
        PlanError: a policy by score, where the blocks that it chooses among cannot be scored.
    """
    options = planned_options(plan)
    waiting = [option for option in options if option.selection.pending]
    unknown = [] if are_scored else waiting
    choices = {option.selection.blocks for option in options if option.selection.blocks}
    if not waiting and not (plan.search is not None and spec.search is not None and spec.search.probe and len(choices) > 1):
        return plan
    if way.zero_stage == 3:
        return _unprobed(plan, unknown, "under ZeRO-3 no rank holds the whole gradient of a matrix", "a lower resources.zero")
    alone = replace(way, executor="torch", ranks=1, zero_stage=0, offload="none", micro_batch_rows=1)
    floor = bisect_left(range(anatomy.num_blocks), True, key=partial(_fits, plan, spec, anatomy, alone, room))
    if floor == anatomy.num_blocks:
        return _unprobed(plan, unknown, "the gradient sums of a single block do not fit beside the base", "more memory")
    wanted = max((_num_chosen(option, anatomy) for option in waiting), default=0)
    if wanted > anatomy.num_blocks - floor:
        fitting = f"the gradient sums of only {anatomy.num_blocks - floor} blocks fit beside the base"
        return _unprobed(plan, unknown, fitting, "a smaller share, more memory")
    most_rows = way.micro_batch_rows
    while most_rows > 1 and not _fits(plan, spec, anatomy, replace(alone, micro_batch_rows=most_rows), room, floor):
        most_rows //= 2
    probe = _probe(plan, anatomy, floor, most_rows).model_copy(update={"required": bool(waiting)})
    return plan.model_copy(update={"probe": probe, "reasons": (*plan.reasons, *_reasons(probe, waiting, anatomy))})


def _unprobed(plan: RunPlan, waiting: Sequence[TrialOption], why: str, remedy: str) -> RunPlan:
    if waiting:
        raise PlanError(
            f"{waiting[0].layers} needs scored blocks, and they cannot be scored: {why}",
            where="search.layers" if plan.search is not None else "finetune.layers",
            remedy=f"name blocks, for example last:2; or {remedy}",
        )
    return plan.model_copy(update={"notes": (*plan.notes, f"the blocks are not scored before the search: {why}")})


def _num_chosen(option: TrialOption, anatomy: ModelAnatomy) -> int:
    return num_of_share(parse_policy(option.layers).fraction, anatomy.num_blocks)


def _fits(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, alone: Way, room: RankRoom, floor: int) -> bool:
    """Whether blocks from a floor up can be scored by one rank.

    As unfreezing them by that rank alone, which sums gradients in float32 too, without what the probe does not hold.
    """
    element_bytes = 2 if spec.train.dtype == "bfloat16" else 4
    learning = _learning(plan, anatomy, floor)
    footprint = weigh(anatomy, learning, spec.base.quantize, element_bytes, num_classes=plan.data.num_classes)
    spared = NOT_HELD | {"trainable weights"} if spec.base.quantize != "none" else NOT_HELD
    needed = (term.num_bytes for term in estimate(footprint, alone).device.terms if term.name not in spared)
    return sum(needed) <= room.device_bytes


def _learning(plan: RunPlan, anatomy: ModelAnatomy, floor: int) -> LayerSelection:
    policy = f"blocks:{floor}-{anatomy.num_blocks - 1}"
    return select(anatomy, policy, "full", None, task=plan.base.task, num_classes=plan.data.num_classes)


def _probe(plan: RunPlan, anatomy: ModelAnatomy, floor: int, most_rows: int) -> ProbePlan:
    """Four micro-batches of the plan's rows; to stay within the share of a trial fewer rows in each, then fewer of them."""
    per_token = sum(term.flops for term in option_terms(plan, anatomy, _learning(plan, anatomy, floor)))
    trial = _cheapest_trial(plan, anatomy)
    row = per_token * plan.execution.row_tokens
    affordable = int(MOST_OF_A_TRIAL * trial / row)
    num_batches = max(1, min(MOST_BATCHES, affordable))
    rows = max(1, min(most_rows, affordable // num_batches))
    return ProbePlan(num_batches=num_batches, rows=rows, floor=floor, share_of_trial=num_batches * rows * row / trial)


def _cheapest_trial(plan: RunPlan, anatomy: ModelAnatomy) -> float:
    """Operations of the cheapest trial that nothing stops."""
    tokens = float(plan.total_tokens)
    if plan.search is not None:
        tokens *= plan.search.rung_steps[-1] / plan.total_steps
    each = (option_terms(plan, anatomy, option.selection) for option in planned_options(plan))
    return tokens * min(sum(term.flops for term in terms) for terms in each)


def _reasons(probe: ProbePlan, waiting: Sequence[TrialOption], anatomy: ModelAnatomy) -> Iterator[str]:
    blocks = "every block" if probe.floor == 0 else f"blocks {probe.floor} to {anatomy.num_blocks - 1}"
    over = "" if probe.share_of_trial <= MOST_OF_A_TRIAL else f", more than {MOST_OF_A_TRIAL:.0%}, and cannot be reduced further"
    yield (
        f"{blocks} is scored before the search: {probe.num_batches} x {probe.rows} rows, {probe.share_of_trial:.1%} "
        "of the operations of the "
        f"cheapest trial{over}"
    )
    if probe.floor:
        yield f"the sums of the gradients of blocks 0 to {probe.floor - 1} do not fit: `top:` does not choose these blocks"
    for layers, count in {option.layers: _num_chosen(option, anatomy) for option in waiting}.items():
        yield (
            f"{layers} is planned as its worst case, {count} of the largest blocks with the cut at block 0: "
            "the blocks are known only after scoring"
        )


def with_scores(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, found: LayerScores | None) -> RunPlan:
    """The plan once the blocks are scored: policies by score name their blocks, and the search knows each option's share.

    Options keep their places, for trials refer to them by index; what was planned for their worst case stands, but for the
    trunk, which is weighed again where a policy has found its cut.
    """
    if found is None or not found.scores:
        return plan
    resolved = _resolved(plan, anatomy, found)
    waited = any(option.selection.pending for option in planned_options(plan))
    if not waited or plan.cost is None:
        return resolved
    trunk, reason = plan_trunk(resolved, spec, anatomy, plan.cost.rate)
    return resolved.model_copy(update={"trunk": trunk, "notes": (*plan.notes, f"after scoring, {reason}")})


def _resolved(plan: RunPlan, anatomy: ModelAnatomy, found: LayerScores) -> RunPlan:

    def chosen(option: TrialOption) -> TrialOption:
        if not option.selection.pending:
            return option
        task, num_classes = plan.base.task, plan.data.num_classes
        selection = select(
            anatomy, option.layers, option.tune, option.lora_rank, task=task, num_classes=num_classes, scores=found.scores
        )
        return option.model_copy(update={"selection": selection})

    if plan.finetune is not None:
        return plan.model_copy(update={"finetune": chosen(plan.finetune)})
    assert plan.search is not None
    options = tuple(chosen(option) for option in plan.search.options)
    shares = score_shares([option.selection.blocks for option in options], found.scores)
    return plan.model_copy(update={"search": plan.search.model_copy(update={"options": options, "shares": shares})})


def score_shares(blocks: Sequence[Sequence[int]], scores: Sequence[float | None]) -> tuple[float, ...]:
    """What each choice of blocks holds of the summed scores: 1 for all of them, 0 for none."""
    each = [score or 0.0 for score in scores]
    whole = sum(each) or 1.0
    return tuple(sum(each[block] for block in chosen) / whole for chosen in blocks)
