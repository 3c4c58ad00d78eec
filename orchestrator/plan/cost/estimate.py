"""Estimate the cost of a run: operations item by item, GPU-hours, price and disk space.

Hours are operations divided by the expected rate, a share of the GPU's peak. Until a run has taken its first steps the share
is assumed and the hours are rough; they do not include starting, loading, saving and merging.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.anatomy import select, select_everything
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.cost.accelerators import find_accelerator
from orchestrator.plan.cost.choices import (
    fisher_costs,
    fisher_of_refit,
    fisher_of_repeat,
    option_terms,
    per_target_token,
    scored_flops,
)
from orchestrator.plan.cost.disk import TOKEN_BYTES, all_tokens, bundle_bytes, disk_usage
from orchestrator.plan.cost.flops import (
    attention_width,
    block_flops_per_token,
)
from orchestrator.plan.estimates import CostEstimate, CostItem, FlopTerm, OptionCost, Rate
from orchestrator.plan.placement import Machines
from orchestrator.plan.schedule import follow_up_rung_steps, share_documents, surviving_share
from orchestrator.plan.values import RunPlan, SearchPlan, SweepPlan
from orchestrator.units import format_count, format_flops
from orchestrator.work.execution import ExecutionPlan

ACHIEVED_SHARE = 0.35
"""Assumed share of a GPU's peak that a training step reaches. Published runs of large dense models reach 0.38 to 0.43 on H100s
(Llama Team 2024, The Llama 3 Herd of Models, table 4); short rows, small models and adapters reach less."""
CPU_FLOPS_PER_CORE = 40e9
"""Rate of a core in float32 and bf16 at rows of 128 and more: measured, 35 to 42 GFLOP/s."""
REFIT = "refit"
"""Item of training the winner again to the full budget."""
TRIALS = "trials"
"""Item of training the searched trials."""


def rate_of(found: Machines) -> Rate:
    """Return the rate of one GPU, or of one core. Ranks of a gang wait for each other, so the slowest of different GPUs
    decides."""
    if found.device == "cpu":
        return Rate(device="core", peak_flops=CPU_FLOPS_PER_CORE, achieved_share=1.0, source="measured, not a peak rate")
    rows = [(node.gpu_name, find_accelerator(node.gpu_name)) for node in found.nodes]
    unknown = sorted({name or "unnamed" for name, row in rows if row is None})
    if unknown:
        return Rate(device=", ".join(unknown), peak_flops=None, achieved_share=ACHIEVED_SHARE, source="not in the table")
    # Ranks of a gang wait for each other at every step.
    name, slowest = min(((name, row) for name, row in rows if row), key=lambda pair: pair[1].peak_flops)
    source = f"peak: {slowest.source}; share: assumed"
    return Rate(device=name, peak_flops=slowest.peak_flops, achieved_share=ACHIEVED_SHARE, source=source)


def estimate_cost(plan: RunPlan, anatomy: ModelAnatomy, rate: Rate, *, price_per_gpu_hour: float | None = None) -> CostEstimate:
    """Estimate operations, hours, price and disk space of a plan at a rate."""
    options = plan.options
    terms = [option_terms(plan, anatomy, option.selection) for option in options]
    operations, without_stopping = _operations(plan, anatomy, terms)
    total = sum(part.amount for part in operations)
    refit = sum(part.amount for part in operations if part.name == REFIT)
    trial = [flops * plan.total_tokens * _budget(plan) for flops in per_target_token(options, terms)]
    units, refit_units = units_of_gang(plan.execution), units_of_gang(plan.refit_execution)
    follow_up, longest_follow_up = follow_up_work(plan, operations)
    # However many gangs there are, the search takes at least as long as one trial that is not stopped.
    searched = max((total - refit - follow_up) / (units * _busy_gangs(plan)), max(trial, default=0.0) / units)
    search_seconds = _seconds(rate, searched + longest_follow_up / units)
    rungs = expected_rungs(plan.search) if isinstance(plan, SweepPlan) else 0.0
    disk, checkpoint_bytes = disk_usage(plan, anatomy, options, _head(plan, anatomy), rungs)
    on_gpus = plan.execution.device == "cuda"
    gpu_hours, core_hours = (_hours(rate, total), None) if on_gpus else (None, _hours(rate, total))
    whole_hours = _hours(rate, without_stopping) if on_gpus else None
    refit_hours = _hours(rate, refit)
    return CostEstimate(
        rate=rate,
        options=tuple(
            OptionCost(
                layers=option.layers,
                tune=option.tune,
                lora_rank=option.lora_rank,
                method=option.method,
                terms=each,
                flops_per_token=sum(term.flops for term in each),
                trial_seconds=_seconds(rate, flops / units),
            )
            for option, each, flops in zip(options, terms, trial, strict=True)
        ),
        operations=operations,
        operations_without_stopping=without_stopping,
        operations_refit=refit,
        gpu_hours=gpu_hours,
        gpu_hours_without_stopping=whole_hours,
        gpu_hours_refit=refit_hours if on_gpus else None,
        core_hours=core_hours,
        wall_hours=None if search_seconds is None or refit_hours is None else search_seconds / 3600 + refit_hours / refit_units,
        price_per_gpu_hour=price_per_gpu_hour,
        price=_times(gpu_hours, price_per_gpu_hour),
        price_without_stopping=_times(whole_hours, price_per_gpu_hour),
        disk=disk,
        disk_bytes=round(sum(part.amount for part in disk)),
        checkpoint_bytes=checkpoint_bytes,
        bundle_bytes=bundle_bytes(plan, anatomy, options),
        cache_bytes=TOKEN_BYTES * all_tokens(plan.data),
    )


def _building_trunk(plan: RunPlan, anatomy: ModelAnatomy) -> CostItem | None:
    """Return the one forward pass over all sets that fills the trunk cache."""
    if plan.trunk is None:
        return None
    stop, tokens = plan.trunk.cuts[-1], all_tokens(plan.data)
    per_token = block_flops_per_token(anatomy, attention_width(anatomy, plan.execution, plan.data), stop)
    return CostItem(
        name="trunk", amount=tokens * per_token, reason=f"{format_count(tokens)} tokens through {stop} blocks once, then stored"
    )


def expected_rungs(search: SearchPlan) -> float:
    """Return the rungs that a trial reaches on average if one in `reduction_factor` continues after each comparison."""
    return sum(surviving_share(search, rung) for rung in range(len(search.rung_steps)))


def expected_steps(search: SearchPlan) -> float:
    """Return the steps that a trial trains on average if one in `reduction_factor` continues after each comparison."""
    befores = (0, *search.rung_steps)
    return sum((step - befores[rung]) * surviving_share(search, rung) for rung, step in enumerate(search.rung_steps))


def run_flops(plan: RunPlan, anatomy: ModelAnatomy) -> float:
    """Return the operations of the whole run as expected."""
    parts, _ = _operations(plan, anatomy, [option_terms(plan, anatomy, option.selection) for option in plan.options])
    return sum(part.amount for part in parts)


def _operations(plan: RunPlan, anatomy: ModelAnatomy, terms: Sequence[Sequence[FlopTerm]]) -> tuple[tuple[CostItem, ...], float]:
    """Return (items of the run as expected, operations if no trial is stopped early)."""
    per_token = per_target_token(plan.options, terms)
    scored, trunk = scored_flops(plan, anatomy), _building_trunk(plan, anatomy)
    built = (*((trunk,) if trunk is not None else ()), *fisher_costs(plan, anatomy))
    at_cut = [scored_flops(plan, anatomy, option.selection.cut) for option in plan.options]
    if not isinstance(plan, SweepPlan):
        # The base is scored through all of its blocks, the trained model from its cut if the trunk is cached.
        trained, scored = per_token[0] * plan.total_tokens, (scored + at_cut[0]) / 2
        parts = (
            *built,
            CostItem(name="training", amount=trained, reason=f"{_rate(per_token[0])} x {format_count(plan.total_tokens)} tokens"),
            CostItem(name="scoring", amount=2 * scored, reason="the base model and the trained model"),
        )
        return parts, sum(part.amount for part in parts)
    search = plan.search
    # A mean, since the last step of an epoch is usually not full.
    per_step = plan.total_tokens / plan.total_steps
    mean, count = sum(per_token) / len(per_token), search.num_trials
    steps, rungs = expected_steps(search), expected_rungs(search)
    head = sum(term.flops for term in option_terms(plan, anatomy, _head(plan, anatomy)))
    scored_trial = sum(at_cut) / len(at_cut)
    scored_head = scored_flops(plan, anatomy, _head(plan, anatomy).cut)
    # The control `none` is scored once; `head` is trained to the last rung and scored at every rung.
    controls = head * search.rung_steps[-1] * per_step + scored + len(search.rung_steps) * scored_head
    follow_up = follow_up_costs(plan, anatomy, max(per_token), scored) + learning_curve_costs(plan, max(per_token), max(at_cut))
    refits = search.rung_steps[-1] < plan.total_steps
    refit = max(per_token) * plan.total_tokens + fisher_of_refit(plan, anatomy) if refits else 0.0
    of = f"{count} trials x {steps:.4g} of {search.rung_steps[-1]} steps"
    parts = [
        *built,
        CostItem(
            name=TRIALS, amount=count * mean * steps * per_step, reason=f"{of} x {per_step:.4g} tokens x {_rate(mean)}, mean"
        ),
        CostItem(
            name="scoring",
            amount=count * rungs * scored_trial,
            reason=f"{count} trials x {rungs:.3g} rungs x {format_flops(scored_trial)}, a forward pass",
        ),
        CostItem(name="controls", amount=controls, reason="the base model, scored; the head alone, trained to the last rung"),
    ]
    parts += follow_up
    if refit:
        parts.append(CostItem(name=REFIT, amount=refit, reason="the winner at the full budget, assuming the costliest choice"))
    searched = count * (mean * search.rung_steps[-1] * per_step + len(search.rung_steps) * scored_trial)
    whole = sum(part.amount for part in built) + searched + controls + sum(part.amount for part in follow_up) + refit
    return tuple(parts), whole


def _head(plan: RunPlan, anatomy: ModelAnatomy) -> LayerSelection:
    return select(anatomy, "head", "full", None, task=plan.base.task, num_classes=plan.data.num_classes)


def _rate(flops_per_token: float) -> str:
    return f"{format_flops(flops_per_token)} per token"


def _seconds(rate: Rate, operations: float) -> float | None:
    return None if rate.flops is None else operations / rate.flops


def _hours(rate: Rate, operations: float) -> float | None:
    return None if rate.flops is None else operations / rate.flops / 3600


def _times(hours: float | None, price: float | None) -> float | None:
    return None if hours is None or price is None else hours * price


def units_of_gang(execution: ExecutionPlan) -> int:
    """Return the number of GPUs, or cores, of one gang."""
    return execution.ranks * (1 if execution.device == "cuda" else execution.threads_per_rank)


def _busy_gangs(plan: RunPlan) -> int:
    return min(plan.num_gangs, plan.search.num_trials) if isinstance(plan, SweepPlan) else 1


def _budget(plan: RunPlan) -> float:
    """Return the share of the full budget that a trial gets if nothing stops it."""
    return plan.search.rung_steps[-1] / plan.total_steps if isinstance(plan, SweepPlan) else 1.0


SHUFFLED, SCRATCH, REPEATS, CURVE = FOLLOW_UP_COSTS = ("shuffled", "scratch", "repeats", "curve")
"""Names of the cost items of follow-up trials (not of controls). One gang trains each; gangs work in parallel."""


def follow_up_costs(plan: SweepPlan, anatomy: ModelAnatomy, per_token: float, scored: float) -> list[CostItem]:
    """Return the cost of the follow-up trials: controls trained once the winner is known, and the winner from other seeds.

    Args:
        per_token: Operations per token of the costliest choice, given the trunk cache.
        scored: Operations of scoring the base without a cache.
    """
    parts: list[CostItem] = []
    if plan.search.repeats > 1:
        others = plan.search.repeats - 1
        reason = f"the winner trained from {others} other seed{'s' if others > 1 else ''}, assuming the costliest choice"
        scorings = _num_scorings(plan, 1.0) * scored
        amount = others * (per_token * plan.total_tokens + scorings + fisher_of_repeat(plan, anatomy))
        parts.append(CostItem(name=REPEATS, amount=amount, reason=reason))
    if SHUFFLED in plan.search.controls:
        reason = "the winner trained again on answers permuted among the prompts, assuming the costliest choice"
        amount = _shuffled_per_token(plan, anatomy) * plan.total_tokens + scored
        parts.append(CostItem(name=SHUFFLED, amount=amount, reason=reason))
    if plan.scratch_memory is not None:
        everything = select_everything(anatomy, task=plan.base.task, num_classes=plan.data.num_classes)
        of_everything = sum(term.flops for term in option_terms(plan, anatomy, everything))
        reason = "random weights, all trainable, for as many steps as the winner"
        parts.append(CostItem(name=SCRATCH, amount=of_everything * plan.total_tokens + scored, reason=reason))
    return parts


def curve_trained_shares(plan: SweepPlan) -> tuple[float, ...]:
    """Return the shares that the learning curve's trials train on, including the whole if no trial of the search gets the full
    budget."""
    shares = plan.search.curve_shares
    return (*shares, 1.0) if shares and plan.search.rung_steps[-1] < plan.total_steps else shares


def learning_curve_costs(plan: SweepPlan, per_token: float, scored: float) -> list[CostItem]:
    """Return the cost of training the winner on shares of the documents, including all of them if no trial of the search gets
    the full budget.

    Args:
        per_token: Operations per token of the costliest choice, given the trunk cache: a share's documents are among the cached.
        scored: Operations of scoring the costliest choice.
    """
    shares = curve_trained_shares(plan)
    if not shares:
        return []
    total = plan.data.train_documents
    counts = ", ".join(str(share_documents(share, total)) for share in shares)
    reason = f"the winner trained again on {counts} of {total} documents each, assuming the costliest choice"
    amount = sum(share * per_token * plan.total_tokens + _num_scorings(plan, share) * scored for share in shares)
    return [CostItem(name=CURVE, amount=amount, reason=reason)]


def follow_up_work(plan: RunPlan, operations: Sequence[CostItem]) -> tuple[float, float]:
    """Return (operations of all follow-up trials, operations of the gang that is busy with them longest)."""
    parts = {part.name: part.amount for part in operations if part.name in FOLLOW_UP_COSTS}
    if not parts or not isinstance(plan, SweepPlan):
        return 0.0, 0.0
    shares = curve_trained_shares(plan)
    # An item of several training runs is divided among gangs, so what keeps one gang busy is its largest single run.
    largest = {REPEATS: 1.0 / max(1, plan.search.repeats - 1), CURVE: max(shares) / sum(shares) if shares else 1.0}
    total, longest = sum(parts.values()), max(amount * largest.get(name, 1.0) for name, amount in parts.items())
    return total, max(total / plan.num_gangs, longest)


def _num_scorings(plan: SweepPlan, share: float) -> int:
    """Return how often a follow-up trial on a share of the documents is scored if nothing stops it early."""
    return len(follow_up_rung_steps(plan.search, plan.total_steps, math.ceil(share * plan.total_steps)))


def _shuffled_per_token(plan: RunPlan, anatomy: ModelAnatomy) -> float:
    """Return the operations per token of the costliest choice without the trunk cache, which does not hold the shuffled
    documents."""
    bare = plan.model_copy(update={"trunk": None})
    options = plan.options
    return max(per_target_token(options, [option_terms(bare, anatomy, option.selection) for option in options]))
