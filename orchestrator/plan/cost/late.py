"""Operations of what is trained once the winner is known: its controls, itself from other seeds, its learning curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.anatomy import select_everything
from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.cost.choices import option_terms, per_target_token, planned_options
from orchestrator.plan.cost.fisher import fisher_of_repeat
from orchestrator.plan.curve import share_documents
from orchestrator.plan.estimates import Part
from orchestrator.plan.steps import late_rung_steps
from orchestrator.plan.values import RunPlan

SHUFFLED, SCRATCH, REPEATS, CURVE = LATE_PARTS = ("shuffled", "scratch", "repeats", "curve")
"""Names of the parts, not of the controls (`LATE_CONTROLS`). Each training is one gang's, and gangs do them side by side."""


def late_parts(plan: RunPlan, anatomy: ModelAnatomy, per_token: float, scored: float) -> list[Part]:
    """Controls that are trained once the winner is known, and the winner itself from other seeds.

    Args:
        per_token: Of the costliest choice, with what is stored of the trunk.
        scored: Of scoring all of the base.
    """
    assert plan.search is not None
    parts: list[Part] = []
    if plan.search.repeats > 1:
        others = plan.search.repeats - 1
        reason = f"the winner trained from {others} other seed{'s' if others > 1 else ''}, if it is the costliest choice"
        scorings = _num_scorings(plan, 1.0) * scored
        amount = others * (per_token * plan.total_tokens + scorings + fisher_of_repeat(plan, anatomy))
        parts.append(Part(name=REPEATS, amount=amount, reason=reason))
    if SHUFFLED in plan.search.controls:
        reason = "the winner trained again on answers permuted among the prompts, assuming the costliest choice"
        amount = _shuffled_per_token(plan, anatomy) * plan.total_tokens + scored
        parts.append(Part(name=SHUFFLED, amount=amount, reason=reason))
    if plan.scratch_memory is not None:
        everything = select_everything(anatomy, task=plan.base.task, num_classes=plan.data.num_classes)
        of_everything = sum(term.flops for term in option_terms(plan, anatomy, everything))
        reason = "random weights, all trainable, for as many steps as the winner"
        parts.append(Part(name=SCRATCH, amount=of_everything * plan.total_tokens + scored, reason=reason))
    return parts


def curve_trained_shares(plan: RunPlan) -> tuple[float, ...]:
    """Shares that the curve's trials learn from; the whole is one where no trial of the search gets the full budget."""
    assert plan.search is not None
    shares = plan.search.curve_shares
    return (*shares, 1.0) if shares and plan.search.rung_steps[-1] < plan.total_steps else shares


def curve_parts(plan: RunPlan, per_token: float, scored: float) -> list[Part]:
    """The winner on shares of the documents; on all of them too, where no trial of the search gets the full budget.

    Args:
        per_token: Of the costliest choice, with what is stored of the trunk: a share's documents are among those stored.
        scored: Of the costliest choice.
    """
    assert plan.search is not None
    shares = curve_trained_shares(plan)
    if not shares:
        return []
    total = plan.data.train_documents
    counts = ", ".join(str(share_documents(share, total)) for share in shares)
    reason = f"the winner trained again on {counts} of {total} documents each, if it is the costliest choice"
    amount = sum(share * per_token * plan.total_tokens + _num_scorings(plan, share) * scored for share in shares)
    return [Part(name=CURVE, amount=amount, reason=reason)]


def late_work(plan: RunPlan, operations: Sequence[Part]) -> tuple[float, float]:
    """(operations of all that is trained late, those of the gang that is busy with it longest)."""
    parts = {part.name: part.amount for part in operations if part.name in LATE_PARTS}
    if not parts:
        return 0.0, 0.0
    assert plan.search is not None
    shares = curve_trained_shares(plan)
    largest = {REPEATS: 1.0 / max(1, plan.search.repeats - 1), CURVE: max(shares) / sum(shares) if shares else 1.0}
    total, longest = sum(parts.values()), max(amount * largest.get(name, 1.0) for name, amount in parts.items())
    return total, max(total / plan.num_gangs, longest)


def _num_scorings(plan: RunPlan, share: float) -> int:
    """How often the winner is scored that learns from a share of the documents once more, if nothing ends it early."""
    assert plan.search is not None
    return len(late_rung_steps(plan.search, plan.total_steps, math.ceil(share * plan.total_steps)))


def _shuffled_per_token(plan: RunPlan, anatomy: ModelAnatomy) -> float:
    """Of the costliest choice. Other answers are other documents, for which nothing is stored."""
    bare = plan.model_copy(update={"trunk": None})
    options = planned_options(plan)
    return max(per_target_token(options, [option_terms(bare, anatomy, option.selection) for option in options]))
