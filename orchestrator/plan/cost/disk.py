"""What a run leaves on disk."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.data_size import DataSize
from orchestrator.plan.estimates import Part
from orchestrator.plan.values import RunPlan, TrialOption
from orchestrator.units import format_count

KEPT_CHECKPOINTS = 2
"""Of a trial that saves on the way, the newest; the second is there for the case that the first is damaged."""
STATE_BYTES = 12
"""Of an element that learns in a checkpoint, beside its value: a float32 master and Adam's two moments."""
TOKEN_BYTES = 5
"""Of a token on disk: an int32 id and a supervision mask."""


def bundle_bytes(plan: RunPlan, anatomy: ModelAnatomy, options: Sequence[TrialOption]) -> int:
    """The merged model at its largest: every tensor in its stored dtype, and a copy of a tied head that learns."""
    dropped = {anatomy.head_weight} if plan.base.traits.head.is_new and anatomy.kind == "decoder" else set[str]()
    kept = sum(tensor.num_bytes for name, tensor in anatomy.tensors.items() if name not in dropped)
    unties = any(option.selection.unties_head for option in options)
    return kept + (anatomy.tensors[anatomy.embeddings[0]].num_bytes if unties else 0)


def all_tokens(data: DataSize) -> int:
    return data.train_tokens + data.eval_tokens + data.retain_tokens + data.replay_tokens


def disk_parts(
    plan: RunPlan, anatomy: ModelAnatomy, options: Sequence[TrialOption], head: LayerSelection, rungs: float
) -> tuple[tuple[Part, ...], int]:
    """(what the run directory grows to, bytes of one checkpoint of the largest choice).

    A checkpoint holds what was learned in the compute dtype and, while its trial may go on, a float32 master and two
    moments an element. Every rung that a trial reached keeps what was learned, the control `head` included.

    Args:
        options: What is trained.
        head: Of the control `head`.
        rungs: That a trial is expected to reach.
    """
    element = 2 if plan.execution.dtype == "bfloat16" else 4
    learn = [option.selection.num_trainable_parameters for option in options]
    largest = max(learn, default=0)
    checkpoint = (element + STATE_BYTES) * largest
    tokens = TOKEN_BYTES * all_tokens(plan.data)
    bundle = bundle_bytes(plan, anatomy, options)
    parts = [Part(name="bundle", amount=bundle, reason="the merged model, each tensor in its dtype in the base")]
    if plan.search is not None:
        search, mean = plan.search, sum(learn) / len(learn)
        learned = head.num_trainable_parameters * len(search.rung_steps)
        open_trials = f"{search.concurrent_trials} at a time x {STATE_BYTES} bytes x {format_count(largest)}"
        parts += [
            Part(
                name="trials",
                amount=search.num_trials * rungs * element * mean,
                reason=f"{search.num_trials} trials x {rungs:.3g} rungs x {element} bytes x {format_count(mean)} elements, mean",
            ),
            Part(
                name="open trials",
                amount=search.concurrent_trials * STATE_BYTES * largest,
                reason=f"fp32 master weights and moments: {open_trials}",
            ),
            Part(
                name="control head",
                amount=element * learned,
                reason=f"{element} bytes x {format_count(learned)} elements, all rungs",
            ),
        ]
    way = f"{KEPT_CHECKPOINTS} kept x {element + STATE_BYTES} bytes x {format_count(largest)} elements"
    parts.append(Part(name="intermediate checkpoints", amount=KEPT_CHECKPOINTS * checkpoint, reason=way))
    parts.append(Part(name="tokens", amount=tokens, reason=f"{TOKEN_BYTES} bytes x {format_count(all_tokens(plan.data))}"))
    return tuple(parts), checkpoint
