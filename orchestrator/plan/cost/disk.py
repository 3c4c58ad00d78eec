"""Disk space that a run uses."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.data_size import DataSize
from orchestrator.plan.estimates import CostItem
from orchestrator.plan.values import RunPlan, SweepPlan, TrialOption
from orchestrator.units import format_count

KEPT_CHECKPOINTS = 2
"""Number of intermediate checkpoints kept per trial; the second is a fallback if the first is damaged."""
STATE_BYTES = 12
"""Bytes per trainable element in a checkpoint, besides its value: an fp32 master weight and Adam's two moments."""
TOKEN_BYTES = 5
"""Bytes per token on disk: an int32 id and a byte of the supervision mask."""


def bundle_bytes(plan: RunPlan, anatomy: ModelAnatomy, options: Sequence[TrialOption]) -> int:
    """Return the size of the merged model, at most: every tensor in its stored dtype, and a copy of a tied head that is
    trained."""
    # A classifier's bundle has no output projection.
    dropped = {anatomy.head_weight} if plan.base.traits.head.is_new and anatomy.kind == "decoder" else set[str]()
    kept = sum(tensor.num_bytes for name, tensor in anatomy.tensors.items() if name not in dropped)
    unties = any(option.selection.unties_head for option in options)
    return kept + (anatomy.tensors[anatomy.embeddings[0]].num_bytes if unties else 0)


def all_tokens(data: DataSize) -> int:
    """Return the number of tokens in all sets."""
    return data.train_tokens + data.eval_tokens + data.retain_tokens + data.replay_tokens


def disk_usage(
    plan: RunPlan, anatomy: ModelAnatomy, options: Sequence[TrialOption], head: LayerSelection, rungs: float
) -> tuple[tuple[CostItem, ...], int]:
    """Return (items of the run directory, bytes of one checkpoint of the largest choice).

    A checkpoint holds the trained weights in the compute dtype and, as long as its trial may continue, an fp32 master weight
    and two moments per element. The trained weights of every rung that a trial or the control `head` reached are kept.

    Args:
        options: Choices that are trained.
        head: Selection of the control `head`.
        rungs: Number of rungs that a trial is expected to reach.
    """
    element = 2 if plan.execution.dtype == "bfloat16" else 4
    learn = [option.selection.num_trainable_parameters for option in options]
    largest = max(learn, default=0)
    checkpoint = (element + STATE_BYTES) * largest
    tokens = TOKEN_BYTES * all_tokens(plan.data)
    bundle = bundle_bytes(plan, anatomy, options)
    parts = [CostItem(name="bundle", amount=bundle, reason="the merged model, each tensor in its dtype in the base")]
    if isinstance(plan, SweepPlan):
        search, mean = plan.search, sum(learn) / len(learn)
        learned = head.num_trainable_parameters * len(search.rung_steps)
        # Only trials that may continue keep the optimizer's state.
        open_trials = f"{search.concurrent_trials} at a time x {STATE_BYTES} bytes x {format_count(largest)}"
        parts += [
            CostItem(
                name="trials",
                amount=search.num_trials * rungs * element * mean,
                reason=f"{search.num_trials} trials x {rungs:.3g} rungs x {element} bytes x {format_count(mean)} elements, mean",
            ),
            CostItem(
                name="open trials",
                amount=search.concurrent_trials * STATE_BYTES * largest,
                reason=f"fp32 master weights and moments: {open_trials}",
            ),
            CostItem(
                name="control head",
                amount=element * learned,
                reason=f"{element} bytes x {format_count(learned)} elements, all rungs",
            ),
        ]
    way = f"{KEPT_CHECKPOINTS} kept x {element + STATE_BYTES} bytes x {format_count(largest)} elements"
    parts.append(CostItem(name="intermediate checkpoints", amount=KEPT_CHECKPOINTS * checkpoint, reason=way))
    parts.append(CostItem(name="tokens", amount=tokens, reason=f"{TOKEN_BYTES} bytes x {format_count(all_tokens(plan.data))}"))
    return tuple(parts), checkpoint
