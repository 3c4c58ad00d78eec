"""Decide whether the trunk is computed once and cached, by comparing what caching costs with what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.anatomy import select
from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.cost.estimate import expected_rungs, expected_steps
from orchestrator.plan.cost.flops import attention_width, block_flops_per_token
from orchestrator.plan.estimates import Rate
from orchestrator.plan.values import RunPlan, SweepPlan
from orchestrator.spec.models import JobSpec
from orchestrator.units import format_bytes, format_count
from orchestrator.work.execution import TrunkPlan

READ_BYTES_PER_S = 1e9
"""Assumed rate of reading cached states. A page cache is several times as fast, an NVMe disk two to seven times (vendors' data
sheets), a network volume slower."""
WRITE_BYTES_PER_S = 0.5e9
"""Assumed rate of writing and syncing them."""


@dataclass(frozen=True)
class CutUse:
    """Use of the hidden states at one cut by the trials."""

    cut: int
    tokens: float
    """Tokens trained on or scored by all trials with this cut, in the run as expected."""
    flops_per_token: float
    """Operations per token of the blocks below the cut."""


def plan_trunk(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, rate: Rate) -> tuple[TrunkPlan | None, str]:
    """Return (what is cached, why). The plan must have its options, execution and data.

    One forward pass over the sets, to the highest cached cut, is weighed against running the blocks below each trial's cut for
    every token that it trains on or is scored on; reading and writing the states counts too, if the rate of the machine is known.
    A cut is omitted if it does not pay off, or if the budget has no room for it.
    """
    if spec.resources.cache_bytes == 0:
        return None, "the trunk (frozen lower blocks) is computed at every step: resources.cache_bytes is 0"
    if not (anatomy.ways.injects and anatomy.ways.projects):
        seen = anatomy.ways.reasons.get("injects") or anatomy.ways.reasons.get("projects") or "its class does not allow it"
        return None, f"the trunk (frozen lower blocks) is computed at every step: stored states cannot replace it ({seen})"
    if anatomy.experts is not None and anatomy.experts.balance:
        return None, "the trunk (frozen lower blocks) is computed at every step: the load-balancing loss needs all its routers"
    sets = plan.data.train_tokens + plan.data.eval_tokens + plan.data.retain_tokens + plan.data.replay_tokens
    state_bytes = anatomy.hidden_size * (2 if plan.execution.dtype == "bfloat16" else 4)
    budget = spec.resources.cache_bytes
    uses = sorted(_uses(plan, anatomy), key=lambda use: use.cut)
    if not uses:
        return None, "every trial trains from the first block up: there is no trunk (frozen lower blocks) to store"
    if budget != "auto":
        # If not all cuts fit, those are cached that save the most operations.
        room = int(budget // (sets * state_bytes))
        uses = sorted(sorted(uses, key=lambda use: -use.tokens * use.flops_per_token)[:room], key=lambda use: use.cut)
        if not uses:
            return (
                None,
                f"the trunk (frozen lower blocks) is computed at every step: one cut takes {format_bytes(sets * state_bytes)}",
            )
    chosen = _worthwhile(uses, sets, state_bytes, rate)
    if not chosen:
        return None, "the trunk (frozen lower blocks) is computed at every step: storing it would take more time than it saves"
    cuts = tuple(use.cut for use in chosen)
    num_bytes = len(cuts) * sets * state_bytes
    # Measured in forward passes over the sets up to the highest cut. Filling the cache takes one of them, which the sentence
    # subtracts.
    saved = sum(use.tokens * use.flops_per_token for use in chosen) / (sets * chosen[-1].flops_per_token)
    where = "block " if len(cuts) == 1 else "blocks "
    reason = (
        f"activations entering {where}{', '.join(map(str, cuts))} are cached for {format_count(sets)} tokens, "
        f"{format_bytes(num_bytes)}, "
        f"saving about {saved - 1:.3g} forward passes"
    )
    folder = spec.resources.cache_folder or ""
    return TrunkPlan(cuts=cuts, num_bytes=num_bytes, folder=folder, max_bytes=None if budget == "auto" else budget), reason


def _uses(plan: RunPlan, anatomy: ModelAnatomy) -> list[CutUse]:
    options = plan.options
    scored = plan.data.eval_tokens + plan.data.retain_tokens
    if not isinstance(plan, SweepPlan):
        tokens = {option.selection.cut: float(plan.total_tokens + scored) for option in options}
    else:
        search, per_step = plan.search, plan.total_tokens / plan.total_steps
        each = expected_steps(search) * per_step + expected_rungs(search) * scored
        tokens: dict[int, float] = {}
        for option in options:
            cut = option.selection.cut
            tokens[cut] = tokens.get(cut, 0.0) + each * search.num_trials / len(options)
        # The control `head` is part of every sweep, begins above the last block and is trained to the last rung.
        head = select(anatomy, "head", "full", None, task=plan.base.task, num_classes=plan.data.num_classes).cut
        tokens[head] = tokens.get(head, 0.0) + search.rung_steps[-1] * per_step + scored
    width = attention_width(anatomy, plan.execution, plan.data)
    return [CutUse(cut, count, block_flops_per_token(anatomy, width, cut)) for cut, count in tokens.items() if cut > 0]


def _worthwhile(uses: Sequence[CutUse], sets: int, state_bytes: int, rate: Rate) -> list[CutUse]:
    """Return the cuts that save the most together: cuts are dropped one at a time, as long as that increases the saving."""
    chosen = list(uses)
    while chosen:
        gain = _gain(chosen, sets, state_bytes, rate)
        fewer = [[use for use in chosen if use is not left_out] for left_out in chosen]
        best = max(fewer, key=lambda rest: _gain(rest, sets, state_bytes, rate))
        if gain > 0 and gain >= _gain(best, sets, state_bytes, rate):
            return chosen
        chosen = best
    return chosen


def _gain(uses: Sequence[CutUse], sets: int, state_bytes: int, rate: Rate) -> float:
    """Return the saving in seconds of one rank; in operations if its rate is unknown, without the cost of reading and writing."""
    if not uses:
        return 0.0
    operations = sum(use.tokens * use.flops_per_token for use in uses) - sets * max(use.flops_per_token for use in uses)
    if rate.flops is None:
        return operations
    read = sum(use.tokens for use in uses) * state_bytes / READ_BYTES_PER_S
    return operations / rate.flops - read - len(uses) * sets * state_bytes / WRITE_BYTES_PER_S
