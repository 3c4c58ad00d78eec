"""Decide whether the trainable blocks are compiled, and plan the other measurements that come before a search.

Compiled code sums in another order than the libraries' kernels, so that its losses differ in their last bits. The choice is
made once per run: all its trials stay comparable, and a trial's numbers depend on nothing but the trial.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from orchestrator.anatomy import LayerSelection, ModelAnatomy, select
from orchestrator.anatomy.selection import num_of_share
from orchestrator.errors import PlanError
from orchestrator.plan.cost.choices import option_terms
from orchestrator.plan.cost.estimate import TRIALS, units_of_gang
from orchestrator.plan.fusing import concurrent_trials
from orchestrator.plan.ladder import RankRoom
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.plan.trunk import plan_trunk
from orchestrator.plan.values import FinetunePlan, RunPlan, SweepPlan, TrialOption
from orchestrator.spec.models import JobSpec
from orchestrator.spec.policy import parse_policy
from orchestrator.units import format_seconds
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.measurements import CompileChoice, CompilePlan, CompileTimes, LayerScores, ProbePlan, ShiftPlan

KIND_SECONDS = 90.0
"""Estimated seconds to compile one choice of (tune, lora_rank), whatever the number of its blocks: there are two kinds of
blocks, the one at the cut, whose input needs no gradient, and those above it. From an empty cache 35 s on one core were
measured (`scripts/bench sweep compile`), and a core is seldom idle; assumed for a GPU."""
WORTH = 20.0
"""Compiled blocks are measured where the search trains at least so many times as long as compiling would take."""
MOST_OF_EAGER = 0.95
"""A compiled step must take at most this share of the other's time: less gain is noise."""


def with_compiling(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy) -> RunPlan:
    """Return the plan with the measurement of compiled blocks before the search, or with a note why there is none.

    Raises:
        PlanError: `resources.compile: on`, where blocks cannot be compiled.
    """
    asked = spec.resources.compile
    against = why_never(plan.execution if isinstance(plan, SweepPlan) else plan.refit_execution, spec, anatomy)
    if any(option.selection.adapter.dropout for option in plan.options):
        against = against or "lora_dropout would draw different random numbers"
    if asked == "off":
        return plan
    if asked == "on" and against is not None:
        raise PlanError(
            f"the blocks cannot be compiled: {against}",
            where="resources.compile",
            expected="auto or off",
            remedy="leave it to auto",
        )
    if not isinstance(plan, SweepPlan):
        execution = plan.refit_execution.model_copy(update={"compiled": asked == "on"})
        return plan.model_copy(update={"refit_execution": execution})
    found = _planned(plan, against, required=asked == "on")
    if asked == "on" and found.option is None:
        raise PlanError(found.reason, where="resources.compile", expected="auto or off", remedy="leave it to auto")
    return plan.model_copy(update={"compiling": found, "notes": (*plan.notes, found.reason)})


def why_never(execution: ExecutionPlan, spec: JobSpec, anatomy: ModelAnatomy) -> str | None:
    """Return why the blocks cannot be compiled, whatever that would gain; None where they can."""
    if execution.executor != "torch":
        return "DeepSpeed's engines hook into every module"
    if execution.ranks > 1:
        return "if one of several ranks cannot compile, the others would wait for it"
    if spec.base.quantize != "none":
        return f"{spec.base.quantize} is multiplied by library kernels, which cannot be compiled"
    if spec.traits.head.one_document_per_row or not execution.pack:
        return "rows that are not packed have many widths, and each width needs its own compilation"
    if anatomy.experts is not None:
        return "routed experts receive a different number of tokens each time"
    if anatomy.dropout:
        return f"{anatomy.dropout} would draw different random numbers"
    return None


def _planned(plan: SweepPlan, against: str | None, *, required: bool) -> CompilePlan:
    if against is not None:
        return CompilePlan(option=None, reason=f"the blocks are not compiled: {against}")
    options = plan.search.options
    kinds = len({(option.tune, option.lora_rank, option.selection.adapter) for option in options if learns_in_blocks(option)})
    if not kinds:
        return CompilePlan(option=None, reason="the blocks are not compiled: none of them is trainable")
    seconds = gang_seconds(plan)
    option = max(
        (index for index, option in enumerate(options) if learns_in_blocks(option)),
        key=lambda index: (not options[index].selection.pending, options[index].selection.num_trainable_parameters),
    )
    if required:
        return CompilePlan(
            option=option,
            reason="the blocks are compiled, as resources.compile says",
            num_kinds=kinds,
            gang_seconds=seconds,
            required=True,
        )
    if plan.search.max_fused > 1:
        sharing = "trials share batches, and each set of batched trials needs its own compilation"
        return CompilePlan(option=None, reason=f"the blocks are not compiled: {sharing}")
    if seconds is None:
        return CompilePlan(option=None, reason="the blocks are not compiled: how long the search takes is unknown")
    expected = kinds * KIND_SECONDS
    weighed = f"a gang trains for {format_seconds(seconds)}, and compiling takes about {format_seconds(expected)}"
    if seconds < WORTH * expected:
        return CompilePlan(option=None, reason=f"the blocks are not compiled: {weighed}")
    reason = f"whether compiled blocks save time is measured before the search: {weighed}"
    return CompilePlan(option=option, reason=reason, num_kinds=kinds, gang_seconds=seconds)


def learns_in_blocks(option: TrialOption) -> bool:
    """Return whether a choice has a block to compile; one that waits for scores will have one."""
    return option.selection.pending or bool(option.selection.blocks)


def gang_seconds(plan: RunPlan) -> float | None:
    """Return the planned training seconds of a gang in the search, without controls and refit; None if the rate is unknown."""
    if plan.cost is None or plan.cost.rate.flops is None:
        return None
    trained = sum(part.amount for part in plan.cost.operations if part.name == TRIALS)
    return trained / (plan.cost.rate.flops * units_of_gang(plan.execution) * plan.num_gangs)


def standing_choice(asked: Literal["auto", "on", "off"], known: CompileChoice | None) -> CompileChoice | None:
    """Return the choice if it needs no measurement: the requested one, or that of an earlier submission of the run."""
    if asked == "off":
        return CompileChoice(compiled=False, reason="resources.compile is off")
    if known is None or (asked == "on" and not known.compiled):
        return None
    return known


def choice_of(plan: CompilePlan, times: CompileTimes) -> CompileChoice:
    """Choose by a measurement: compiled blocks must save more time over the search than compiling all of them takes.

    The saving is the share saved of a full micro-batch's time, times the planned training time of a gang in full micro-batches.
    """
    if times.failed:
        return CompileChoice(compiled=False, reason=f"the blocks cannot be compiled: {times.failed}", times=times)
    share = times.compiled_seconds / times.eager_seconds
    spent = times.compile_seconds * plan.num_kinds
    reason = (
        f"a compiled micro-batch takes {1e3 * times.compiled_seconds:.1f} ms, {share:.2f} of {1e3 * times.eager_seconds:.1f} ms; "
        f"compiling takes {format_seconds(spent)} per gang (worker group)"
    )
    if plan.required:
        return CompileChoice(compiled=True, reason=reason, times=times)
    saved = (1 - share) * times.full_share * (plan.gang_seconds or 0.0)
    reason = f"{reason}, and saves {format_seconds(max(0.0, saved))}"
    return CompileChoice(compiled=share <= MOST_OF_EAGER and spent < saved, reason=reason, times=times)


def with_choice(plan: RunPlan, choice: CompileChoice | None) -> RunPlan:
    """Return the plan once the choice is made, with nothing left to measure. With compiled blocks trials share no batch.

    Without a choice the plan is returned unchanged.
    """
    if choice is None:
        return plan
    compiled = choice.compiled and plan.execution.executor == "torch"
    refit = choice.compiled and plan.refit_execution.executor == "torch"
    update: dict[str, object] = {
        "execution": plan.execution.model_copy(update={"compiled": compiled}),
        "refit_execution": plan.refit_execution.model_copy(update={"compiled": refit}),
        "compiling": None,
    }
    if compiled and isinstance(plan, SweepPlan):
        concurrent = concurrent_trials(plan.search.num_trials, plan.num_gangs, 1)
        update["search"] = plan.search.model_copy(update={"max_fused": 1, "concurrent_trials": concurrent})
    return plan.model_copy(update=update)


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
"""Memory terms of training the same blocks that the probe does not have: it uses no optimizer and changes no weight."""


def with_probe(
    plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, way: Candidate, room: RankRoom, *, are_scored: bool = False
) -> RunPlan:
    """Return the plan with its probe, if there is one, and the reasons for it.

    Args:
        way: The execution of the gang that runs it.
        room: The memory of each of its ranks.
        are_scored: Whether the run has the scores already: then these gangs need not be able to compute them.

    Raises:
        PlanError: a policy by score, where the blocks that it chooses among cannot be scored.
    """
    options = plan.options
    waiting = [option for option in options if option.selection.pending]
    unknown = [] if are_scored else waiting
    choices = {option.selection.blocks for option in options if option.selection.blocks}
    if not waiting and not (isinstance(plan, SweepPlan) and spec.search is not None and spec.search.probe and len(choices) > 1):
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
            where="search.layers" if isinstance(plan, SweepPlan) else "finetune.layers",
            remedy=f"name blocks, for example last:2; or {remedy}",
        )
    return plan.model_copy(update={"notes": (*plan.notes, f"the blocks are not scored before the search: {why}")})


def _num_chosen(option: TrialOption, anatomy: ModelAnatomy) -> int:
    return num_of_share(parse_policy(option.layers).fraction, anatomy.num_blocks)


def _fits(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, alone: Candidate, room: RankRoom, floor: int) -> bool:
    """Return whether one rank can score the blocks from a floor up.

    The memory is that of unfreezing them on that rank only, which sums gradients in float32 too, less the terms NOT_HELD.
    """
    element_bytes = 2 if spec.train.dtype == "bfloat16" else 4
    learning = _learning(plan, anatomy, floor)
    footprint = make_footprint(anatomy, learning, spec.base.quantize, element_bytes, num_classes=plan.data.num_classes)
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
    if isinstance(plan, SweepPlan):
        tokens *= plan.search.rung_steps[-1] / plan.total_steps
    each = (option_terms(plan, anatomy, option.selection) for option in plan.options)
    return tokens * min(sum(term.flops for term in terms) for terms in each)


def _reasons(probe: ProbePlan, waiting: Sequence[TrialOption], anatomy: ModelAnatomy) -> Iterator[str]:
    blocks = "every block" if probe.floor == 0 else f"blocks {probe.floor} to {anatomy.num_blocks - 1}"
    share = probe.share_of_trial
    cost = f"{share:.1%} of" if share < 1 else f"{share:.3g}x"
    over = "" if share <= MOST_OF_A_TRIAL else ", and cannot be reduced further"
    are = "is" if probe.floor == 0 else "are"
    yield (
        f"{blocks} {are} scored before the search on {probe.num_batches} x {probe.rows} rows: "
        f"this costs {cost} the cheapest trial{over}"
    )
    if probe.floor:
        yield f"the sums of the gradients of blocks 0 to {probe.floor - 1} do not fit: `top:` does not choose these blocks"
    for layers, count in {option.layers: _num_chosen(option, anatomy) for option in waiting}.items():
        yield (
            f"{layers} is planned as its worst case, {count} of the largest blocks with the cut at block 0: "
            "the blocks are known only after scoring"
        )


def with_scores(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, found: LayerScores | None) -> RunPlan:
    """Return the plan once the blocks are scored: policies by score name their blocks, and each option has its share.

    Options keep their places, since trials refer to them by index. What was planned for their worst case stays, except for the
    trunk, which is planned again where a policy has found its cut.
    """
    if found is None or not found.scores:
        return plan
    resolved = _resolved(plan, anatomy, found)
    waited = any(option.selection.pending for option in plan.options)
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
            anatomy,
            option.layers,
            option.tune,
            option.lora_rank,
            adapter=option.selection.adapter,
            task=task,
            num_classes=num_classes,
            scores=found.scores,
        )
        return option.model_copy(update={"selection": selection})

    if isinstance(plan, FinetunePlan):
        return plan.model_copy(update={"finetune": chosen(plan.finetune)})
    assert isinstance(plan, SweepPlan)
    options = tuple(chosen(option) for option in plan.search.options)
    shares = score_shares([option.selection.blocks for option in options], found.scores)
    return plan.model_copy(update={"search": plan.search.model_copy(update={"options": options, "shares": shares})})


def score_shares(blocks: Sequence[Sequence[int]], scores: Sequence[float | None]) -> tuple[float, ...]:
    """Return the share of the summed scores that each choice of blocks has: 1 for all blocks, 0 for none."""
    each = [score or 0.0 for score in scores]
    whole = sum(each) or 1.0
    return tuple(sum(each[block] for block in chosen) / whole for chosen in blocks)


NUM_DOCUMENTS = 200
"""Documents drawn from each set, by the seed: the interval of a linear probe's error is then narrower than a tenth."""
MOST_CUTS = 4
"""Number of cuts, spread evenly over the blocks, at which features are computed if no trunk activations are stored."""
NO_RETENTION_SET = "there is no retention set to compare with"
"""Why nothing is measured where advice is asked for all the same."""


def with_shift(plan: RunPlan, anatomy: ModelAnatomy) -> RunPlan:
    """Return the plan with its measurement of the domain shift, if there is a retention set.

    It is measured at the cuts whose activations are stored, which costs no forward pass, or else at a few cuts. A classifier
    uses no retention set, even if one is given.
    """
    if not isinstance(plan, SweepPlan) or not plan.data.retain_tokens or not plan.base.traits.head.scores_retention:
        return plan
    count = anatomy.num_blocks
    few = tuple(dict.fromkeys(max(1, round(count * part / MOST_CUTS)) for part in range(1, MOST_CUTS + 1)))
    cuts = plan.trunk.cuts if plan.trunk is not None else few
    return plan.model_copy(update={"shift": ShiftPlan(cuts=cuts, num_documents=NUM_DOCUMENTS)})
