"""Steps, rungs and rows: how the training budget is cut."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.errors import PlanError
from orchestrator.plan.data_size import GRAIN, LEAST_STEPS, MOST_TOKENS, DataSize
from orchestrator.plan.data_size import tokens_per_step as of_a_step
from orchestrator.plan.values import SearchPlan
from orchestrator.spec.models import FEW_EXAMPLES, JobSpec, SearchSpec

REDUCTION_FACTOR = 3
"""ASHA keeps one trial in three at a rung: the default of Li et al. 2020 is 4, 3 spares more of a small sweep."""
MIN_RUNG_STEPS = 4
"""A rung of fewer steps compares warm-ups, not trials."""
EARLY_STOPPING_RUNGS = 8
"""How often a trial is scored that its held-out loss may end."""
MAX_CPU_MICRO_BATCH_TOKENS = 4096
"""Past a few thousand tokens a CPU's matrix products gain nothing, and memory is all that grows."""


def tokens_per_step(spec: JobSpec, data: DataSize) -> int:
    """Tokens of a step at most: the spec's number, or what `auto` came to when the data was measured."""
    if spec.train.tokens_per_step != "auto":
        return spec.train.tokens_per_step
    measured = data.tokens_per_step
    return measured or of_a_step(spec.train, data.train_documents, data.train_tokens, data.longest_document_tokens)


class StepSize(NamedTuple):
    """Of `auto`, once it is known how many ranks share a step."""

    tokens: int
    ranks: int = 1
    """Ranks of a gang that have a row each in a full step."""


def filling_step(spec: JobSpec, size: DataSize, ranks: int) -> StepSize | None:
    """Of `auto`: so large a step that every rank of a gang has a document in it, as far as LEAST_STEPS steps are left.

    None for one rank, and where the spec has a number.

    Args:
        size: With what `auto` came to for the data alone.
    """
    if spec.train.tokens_per_step != "auto" or ranks <= 1:
        return None
    mean = size.train_tokens / max(1, size.train_documents)
    each = GRAIN * math.ceil((size.longest_document_tokens if size.exact else mean) / GRAIN)
    tokens = min(ranks * each, GRAIN * math.ceil(spec.train.epochs * size.train_tokens / LEAST_STEPS / GRAIN), MOST_TOKENS)
    return StepSize(max(size.tokens_per_step, tokens), ranks)


def total_steps(spec: JobSpec, data: DataSize) -> int:
    """Steps of the full budget, at least one."""
    return max(1, math.ceil(spec.train.epochs * data.steps_per_epoch))


def total_tokens(spec: JobSpec, data: DataSize) -> int:
    """Training tokens of the full budget, at least one."""
    return max(1, math.ceil(spec.train.epochs * data.train_tokens))


def rung_steps(
    total_steps: int,
    *,
    budget: float = 1.0,
    scheduler: Literal["asha", "none"] = "asha",
    max_rungs: int = 3,
    reduction_factor: int = REDUCTION_FACTOR,
    min_steps: int = MIN_RUNG_STEPS,
) -> tuple[int, ...]:
    """Steps at which trials are compared, rising; the last is a trial's whole budget.

    S/9, S/3, S for a budget of S steps and three rungs, without those that would come before `min_steps`. 90 -> (10, 30, 90).
    """
    last = max(1, math.ceil(budget * total_steps))
    if scheduler == "none":
        return (last,)
    rungs = [math.ceil(last / reduction_factor**power) for power in range(max_rungs - 1, 0, -1)]
    return (*(step for step in rungs if min_steps <= step < last), last)


def even_rung_steps(total_steps: int, *, budget: float = 1.0, min_steps: int = MIN_RUNG_STEPS) -> tuple[int, ...]:
    """Steps at which trials are scored that their held-out loss may end: up to 8, evenly spaced, `min_steps` apart at least.

    90 -> (12, 23, 34, 45, 57, 68, 79, 90), 9 -> (5, 9).
    """
    last = max(1, math.ceil(budget * total_steps))
    count = max(1, min(EARLY_STOPPING_RUNGS, last // min_steps))
    return tuple(math.ceil(last * rung / count) for rung in range(1, count + 1))


def late_rung_steps(search: SearchPlan, total_steps: int, own_steps: int) -> tuple[int, ...]:
    """Steps at which what is trained late is scored, up to its end: with early stopping where the searched trials are, in
    parts of its own budget, so that its best is the best of as many; else at its end alone.

    Args:
        total_steps: Of the searched trials' full budget.
        own_steps: Of its own, which a share of the data makes smaller.
    """
    if search.patience is None:
        return (own_steps,)
    return tuple(sorted({*(math.ceil(step * own_steps / total_steps) for step in search.rung_steps), own_steps}))


def pace(search: SearchPlan, rung: int) -> int:
    """ASHA's clock at the end of a rung. It compares trials at 1, 3, 9, ... on it (powers of the reduction factor): every rung
    where they are spaced like that, the first and the third of evenly spaced ones."""
    return rung + 1 if search.patience is not None else search.reduction_factor**rung


def share_beyond(search: SearchPlan, rung: int) -> float:
    """Of all trials, how many ASHA lets begin a rung, as far as it decides: one in `reduction_factor` at each comparison."""
    compared = sum(search.reduction_factor**power <= pace(search, rung - 1) for power in range(rung)) if rung else 0
    return search.reduction_factor**-compared


def packs(spec: JobSpec) -> bool:
    """Return whether documents share rows."""
    return spec.data.pack and not spec.traits.head.one_document_per_row


def row_tokens(spec: JobSpec, anatomy: ModelAnatomy, data: DataSize) -> int:
    """Width of a row: `max_tokens` when packing, else the longest document; a multiple of 8 for the tensor cores.
    Of a base without a vocabulary, which reads images, a row is an image: all of its positions.

    Raises:
        PlanError: the longest document has more tokens than the base has positions.
    """
    if not anatomy.vocab_size:
        return anatomy.max_positions
    longest = min(data.longest_document_tokens, spec.data.max_tokens) or 1
    if longest > anatomy.max_positions:
        raise PlanError(
            f"documents have up to {longest} tokens, but the base has only {anatomy.max_positions} positions",
            where="data.max_tokens",
            remedy=f"data.max_tokens: {anatomy.max_positions}",
        )
    of_a_rank = tokens_per_step(spec, data) // data.step_ranks
    width = max(longest, min(spec.data.max_tokens, of_a_rank)) if packs(spec) else longest
    return -(-width // 8) * 8


def max_rows(row_tokens: int, ranks: int, tokens_per_step: int, device: Literal["cpu", "cuda"]) -> int:
    """The most rows that a rank can use at once: a step's share, and on a CPU a few thousand tokens."""
    rows = max(1, tokens_per_step // (row_tokens * ranks))
    return min(rows, max(1, MAX_CPU_MICRO_BATCH_TOKENS // row_tokens)) if device == "cpu" else rows


def accumulation(rows: int, row_tokens: int, ranks: int, tokens_per_step: int) -> int:
    """Rounds of micro-batches that a full step takes."""
    return max(1, math.ceil(tokens_per_step / (rows * row_tokens * ranks)))


AUTO_REPEATS = 5
"""Trainings of the winner, each from another seed: Student's t has 4 degrees of freedom then, and its 95% interval is 2.8
standard errors wide to either side; with 3 trainings it were 4.3."""
PATIENCE = 2
"""Rungs in a row that may bring nothing better; one alone may be chance."""


def has_few(data: DataSize) -> bool:
    return data.train_documents <= FEW_EXAMPLES


def num_repeats(search: SearchSpec, data: DataSize) -> int:
    """From how many seeds the promoted trial is trained in all."""
    if search.repeats == "auto":
        return AUTO_REPEATS if has_few(data) else 1
    return search.repeats


def patience(search: SearchSpec, data: DataSize) -> int | None:
    """After how many rungs without anything better a trial ends, to be judged by its best one; None: by its last."""
    return PATIENCE if has_few(data) and search.scheduler == "asha" else None


def search_rungs(search: SearchSpec, data: DataSize, total_steps: int) -> tuple[int, ...]:
    """Steps at which the trials of a search are scored."""
    if patience(search, data) is not None:
        return even_rung_steps(total_steps, budget=search.budget)
    return rung_steps(total_steps, budget=search.budget, scheduler=search.scheduler, max_rungs=search.rungs)


SHARES = (0.0625, 0.125, 0.25, 0.5)
"""Of the training documents, beside all of them: each share doubles the one before, so that points lie even on a log scale.
The smallest costs next to nothing, and two points more than the law has numbers tell how far a point may lie from it: in
simulations the interval that follows tells a gain twice as often as with one."""
FEWEST_POINTS = 4
"""A law of three numbers goes through any three points, and leaves nothing to tell by how sure it is."""


def share_documents(share: float, num_documents: int) -> int:
    """How many documents a share is of."""
    return round(share * num_documents)


def curve_shares(num_documents: int) -> tuple[float, ...]:
    """The shares to train on beside all documents: those of at least one document; none where the points would be too few."""
    shares = {share_documents(share, num_documents): share for share in SHARES}
    shares = {count: share for count, share in shares.items() if 0 < count < num_documents}
    return tuple(shares.values()) if len(shares) + 1 >= FEWEST_POINTS else ()


def too_few_documents(num_documents: int) -> str:
    """What to hear where a curve was asked for and there are no shares."""
    return (
        f"search.learning_curve is left out: of {num_documents} training document{'' if num_documents == 1 else 's'} there are "
        f"not {FEWEST_POINTS} different shares"
    )
