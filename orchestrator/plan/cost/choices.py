"""Operations of one trial of each choice of the search: per trained token, and to evaluate."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.cost.flops import attention_width, forward_flops_per_token, runs_head_twice, train_terms
from orchestrator.plan.estimates import CostItem, FlopTerm
from orchestrator.plan.remedies import FISHER_DOCUMENTS
from orchestrator.plan.values import RunPlan, SweepPlan, TrialOption
from orchestrator.units import format_count
from orchestrator.work.execution import ExecutionPlan


def option_terms(plan: RunPlan, anatomy: ModelAnatomy, selection: LayerSelection) -> tuple[FlopTerm, ...]:
    """Return the operations per training token, for the planned execution."""
    data, execution = plan.data, plan.execution
    return train_terms(
        anatomy,
        selection,
        attention_width(anatomy, execution, data),
        checkpointing=execution.checkpointing,
        num_classes=data.num_classes,
        supervised_share=data.supervised_share,
        head_twice=runs_head_twice(anatomy, selection, execution, data),
        stored_trunk=_stored(plan, selection.cut) > 0,
        forward_tokens=execution.micro_batch_rows * execution.row_tokens,
    )


def _stored(plan: RunPlan, cut: int) -> int:
    """Return the block at which a trial with this cut begins: the cut if its states are cached, else 0."""
    return cut if plan.trunk is not None and cut in plan.trunk.cuts else 0


def scored_flops(plan: RunPlan, anatomy: ModelAnatomy, cut: int = 0) -> float:
    """Return the operations of scoring the eval and retention sets once, in a trial with this cut."""
    data = plan.data
    width = attention_width(anatomy, plan.execution, data)
    return (data.eval_tokens + data.retain_tokens) * forward_flops_per_token(
        anatomy, width, data.num_classes, supervised_share=data.supervised_share, first=_stored(plan, cut)
    )


def per_target_token(options: Sequence[TrialOption], terms: Sequence[Sequence[FlopTerm]]) -> list[float]:
    """Return, for each choice, the operations of training on one token of the target and on the tokens replayed beside it."""
    return [
        # A share s of all tokens is replayed, so each token of the target means 1 / (1 - s) tokens in all.
        sum(term.flops for term in each) / (1.0 - option.remedies.replay)
        for option, each in zip(options, terms, strict=True)
    ]


def measurements(plan: RunPlan, anatomy: ModelAnatomy, execution: ExecutionPlan) -> list[float]:
    """Return the operations of each Fisher measurement that the plan's choices need on such gangs, the costliest first; none
    without EWC.

    A measurement is reused by all trials with the same inputs (`train.measure.fisher`): besides what is constant in a run, these
    are the trainable weights, the layer decay, the seed, and how ranks hold the weights. Every rank processes every document,
    alone in its row and from the embeddings up even if hidden states are cached; all positions are predicted.
    """
    data = plan.data.model_copy(update={"supervised_share": 1.0, "document_tokens": None})
    alone = execution.model_copy(update={"micro_batch_rows": 1})
    bare = plan.model_copy(update={"trunk": None, "data": data, "execution": alone})
    needed = {
        # Choices with the same key share one measurement.
        (option.selection.pending, option.selection.trainable, option.remedies.layer_decay): option.selection
        for option in plan.options
        if option.remedies.anchor is not None and option.remedies.anchor.traits.uses_fisher
    }
    per_token = (sum(term.flops for term in option_terms(bare, anatomy, selection)) for selection in needed.values())
    return sorted((execution.ranks * _tokens(plan) * flops for flops in per_token), reverse=True)


def fisher_costs(plan: RunPlan, anatomy: ModelAnatomy) -> list[CostItem]:
    """Return the measurements of the searched trials, or of the one trial; with more selections than trials, the costliest."""
    found = measurements(plan, anatomy, plan.execution)
    if isinstance(plan, SweepPlan):
        # More selections than trials: not all of them can be trained, and which ones is not known, so assume the costliest.
        found = found[: plan.search.num_trials]
    if not found:
        return []
    ranks, tokens = plan.execution.ranks, format_count(_tokens(plan))
    of = f"{len(found)} x " + (f"{ranks} ranks x " if ranks > 1 else "")
    reason = f"EWC: {of}up to {tokens} retention tokens, forward and backward, for all trials that learn the same weights"
    return [CostItem(name="fisher", amount=sum(found), reason=reason)]


def fisher_of_repeat(plan: RunPlan, anatomy: ModelAnatomy) -> float:
    """Return the operations of a repeat's measurement: another seed draws other documents. Assumes the costliest EWC choice."""
    return max(measurements(plan, anatomy, plan.execution), default=0.0)


def fisher_of_refit(plan: RunPlan, anatomy: ModelAnatomy) -> float:
    """Return the operations of a refit's measurement if its ranks hold the weights differently; else the trial's is reused."""
    trial, refit = ((each.ranks, each.executor, each.zero_stage) for each in (plan.execution, plan.refit_execution))
    return max(measurements(plan, anatomy, plan.refit_execution), default=0.0) if refit != trial else 0.0


def _tokens(plan: RunPlan) -> int:
    """Return the tokens of one measurement, whose documents may be as long as a row; they come from the scored retention
    tokens if there are no others."""
    return min(FISHER_DOCUMENTS * plan.execution.row_tokens, plan.data.replay_tokens or plan.data.retain_tokens)
