"""Operations of one trial of each choice of the search: to train on a token, and to score."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.cost.flops import attention_width, forward_flops_per_token, runs_head_twice, train_terms
from orchestrator.plan.estimates import FlopTerm
from orchestrator.plan.values import RunPlan, TrialOption


def planned_options(plan: RunPlan) -> tuple[TrialOption, ...]:
    """The search's choices, or the one trial's."""
    if plan.search is not None:
        return plan.search.options
    return (plan.finetune,) if plan.finetune is not None else ()


def option_terms(plan: RunPlan, anatomy: ModelAnatomy, selection: LayerSelection) -> tuple[FlopTerm, ...]:
    """Operations of one token of training, as the plan runs it."""
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
    )


def _stored(plan: RunPlan, cut: int) -> int:
    """The block that a trial with this cut begins at: the cut where its states are stored, else 0."""
    return cut if plan.trunk is not None and cut in plan.trunk.cuts else 0


def scored_flops(plan: RunPlan, anatomy: ModelAnatomy, cut: int = 0) -> float:
    """Operations of scoring the eval and retention sets once, of a trial with this cut."""
    data = plan.data
    width = attention_width(anatomy, plan.execution, data)
    return (data.eval_tokens + data.retain_tokens) * forward_flops_per_token(
        anatomy, width, data.num_classes, supervised_share=data.supervised_share, first=_stored(plan, cut)
    )


def per_target_token(options: Sequence[TrialOption], terms: Sequence[Sequence[FlopTerm]]) -> list[float]:
    """Operations by choice of training on one token of the target, and on what is replayed beside it."""
    return [
        sum(term.flops for term in each) / (1.0 - option.remedies.replay) for option, each in zip(options, terms, strict=True)
    ]
