"""Steps, rungs and rows: how the training budget is divided."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.errors import PlanError
from orchestrator.plan.data_size import MAX_STEP_TOKENS, MIN_TOTAL_STEPS, STEP_TOKENS_MULTIPLE, DataSize
from orchestrator.plan.data_size import tokens_per_step as of_a_step
from orchestrator.plan.values import SearchPlan
from orchestrator.spec.models import FEW_EXAMPLES, JobSpec, SearchSpec

REDUCTION_FACTOR = 3
"""ASHA keeps one trial in three at a rung: the default of Li et al. 2020 is 4; 3 keeps more of a small sweep."""
MIN_RUNG_STEPS = 4
"""Minimum steps of a rung: with fewer, the comparison would be of warm-ups, not of trials."""
EARLY_STOPPING_RUNGS = 8
"""Number of times a trial with early stopping is scored."""
MAX_CPU_MICRO_BATCH_TOKENS = 4096
"""Beyond a few thousand tokens a CPU's matrix products get no faster, and only memory grows."""


def tokens_per_step(spec: JobSpec, data: DataSize) -> int:
    """Return the maximum number of tokens in a step: the spec's number, or what `auto` gave when the data was measured."""
    if spec.train.tokens_per_step != "auto":
        return spec.train.tokens_per_step
    measured = data.tokens_per_step
    return measured or of_a_step(spec.train, data.train_documents, data.train_tokens, data.longest_document_tokens)


class StepSize(NamedTuple):
    """Step size that `auto` gives once it is known how many ranks share a step."""

    tokens: int
    ranks: int = 1
    """Ranks of a gang that have one row each in a full step."""


def filling_step(spec: JobSpec, size: DataSize, ranks: int) -> StepSize | None:
    """Return a step so large that every rank of a gang has a document in it, as far as MIN_TOTAL_STEPS steps remain.

    None for one rank, or if the spec gives a number.

    Args:
        size: Data size with the step that `auto` gave for the data only.
    """
    if spec.train.tokens_per_step != "auto" or ranks <= 1:
        return None
    mean = size.train_tokens / max(1, size.train_documents)
    # Before tokenization the longest document is only known to have at most `data.max_tokens`, so the mean is used instead.
    each = STEP_TOKENS_MULTIPLE * math.ceil((size.longest_document_tokens if size.exact else mean) / STEP_TOKENS_MULTIPLE)
    tokens = min(
        ranks * each,
        STEP_TOKENS_MULTIPLE * math.ceil(spec.train.epochs * size.train_tokens / MIN_TOTAL_STEPS / STEP_TOKENS_MULTIPLE),
        MAX_STEP_TOKENS,
    )
    return StepSize(max(size.tokens_per_step, tokens), ranks)


def total_steps(spec: JobSpec, data: DataSize) -> int:
    """Return the steps of the full budget, at least one."""
    return max(1, math.ceil(spec.train.epochs * data.steps_per_epoch))


def total_tokens(spec: JobSpec, data: DataSize) -> int:
    """Return the training tokens of the full budget, at least one."""
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
    """Return the steps at which trials are compared, ascending; the last is the full budget of a trial.

    For a budget of S steps and three rungs these are S/9, S/3 and S, without those below `min_steps`: 90 -> (10, 30, 90).
    """
    last = max(1, math.ceil(budget * total_steps))
    if scheduler == "none":
        return (last,)
    rungs = [math.ceil(last / reduction_factor**power) for power in range(max_rungs - 1, 0, -1)]
    return (*(step for step in rungs if min_steps <= step < last), last)


def even_rung_steps(total_steps: int, *, budget: float = 1.0, min_steps: int = MIN_RUNG_STEPS) -> tuple[int, ...]:
    """Return the steps at which trials with early stopping are scored: up to 8, evenly spaced, at least `min_steps` apart.

    90 -> (12, 23, 34, 45, 57, 68, 79, 90), 9 -> (5, 9).
    """
    last = max(1, math.ceil(budget * total_steps))
    count = max(1, min(EARLY_STOPPING_RUNGS, last // min_steps))
    return tuple(math.ceil(last * rung / count) for rung in range(1, count + 1))


def follow_up_rung_steps(search: SearchPlan, total_steps: int, own_steps: int) -> tuple[int, ...]:
    """Return the steps at which a follow-up trial, trained after the search, is scored.

    With early stopping it is scored at the same fractions of its budget as the searched trials, so that its best score is the
    best of as many; without, only at its end.

    Args:
        total_steps: Full budget of the searched trials.
        own_steps: Its own budget, which is smaller on a share of the data.
    """
    if search.patience is None:
        return (own_steps,)
    return tuple(sorted({*(math.ceil(step * own_steps / total_steps) for step in search.rung_steps), own_steps}))


def asha_time(search: SearchPlan, rung: int) -> int:
    """Return the time that Tune's ASHA scheduler sees at the end of a rung. It compares trials at times 1, 3, 9, ... (powers
    of the reduction factor): at every rung if rungs are spaced like that, at the first and third of evenly spaced ones."""
    return rung + 1 if search.patience is not None else search.reduction_factor**rung


def surviving_share(search: SearchPlan, rung: int) -> float:
    """Return the share of trials that ASHA lets begin a rung: one in `reduction_factor` at each comparison."""
    # ASHA has compared a trial once for each power of the reduction factor that its clock passed before this rung.
    compared = sum(search.reduction_factor**power <= asha_time(search, rung - 1) for power in range(rung)) if rung else 0
    return search.reduction_factor**-compared


def packs(spec: JobSpec, anatomy: ModelAnatomy) -> bool:
    """Return whether documents share rows."""
    return spec.data.pack and anatomy.ways.packs and not spec.traits.head.one_document_per_row


def row_tokens(spec: JobSpec, anatomy: ModelAnatomy, data: DataSize) -> int:
    """Return the width of a row: `max_tokens` when packing, else the longest document; a multiple of 8 for tensor cores.

    A base without a vocabulary reads images: its row is one image, with all of its positions.

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
    # A packed row wider than a rank's share of the step would leave other ranks without a row.
    of_a_rank = tokens_per_step(spec, data) // data.step_ranks
    width = max(longest, min(spec.data.max_tokens, of_a_rank)) if packs(spec, anatomy) else longest
    return -(-width // 8) * 8


def max_rows(row_tokens: int, ranks: int, tokens_per_step: int, device: Literal["cpu", "cuda"]) -> int:
    """Return the most rows that a rank can use at once: its share of a step, and on a CPU a few thousand tokens."""
    rows = max(1, tokens_per_step // (row_tokens * ranks))
    return min(rows, max(1, MAX_CPU_MICRO_BATCH_TOKENS // row_tokens)) if device == "cpu" else rows


def accumulation(rows: int, row_tokens: int, ranks: int, tokens_per_step: int) -> int:
    """Return how many rounds of micro-batches a full step takes."""
    return max(1, math.ceil(tokens_per_step / (rows * row_tokens * ranks)))


AUTO_REPEATS = 5
"""Training runs of the winner, each from another seed: with 5, Student's t has 4 degrees of freedom and the 95% interval
extends 2.8 standard errors to either side; with 3 it would be 4.3."""
PATIENCE = 2
"""Consecutive rungs without improvement after which a trial ends; a single one may be chance."""


def has_few_examples(data: DataSize) -> bool:
    """Return whether the training set is so small that seeds and early stopping matter."""
    return data.train_documents <= FEW_EXAMPLES


def num_repeats(search: SearchSpec, data: DataSize) -> int:
    """Return the total number of seeds that the promoted trial is trained from."""
    if search.repeats == "auto":
        return AUTO_REPEATS if has_few_examples(data) else 1
    return search.repeats


def patience(search: SearchSpec, data: DataSize) -> int | None:
    """Return after how many rungs without improvement a trial ends, to be judged by its best rung; None to judge it by its
    last."""
    return PATIENCE if has_few_examples(data) and search.scheduler == "asha" else None


def search_rungs(search: SearchSpec, data: DataSize, total_steps: int) -> tuple[int, ...]:
    """Return the steps at which the trials of a search are scored."""
    if patience(search, data) is not None:
        return even_rung_steps(total_steps, budget=search.budget)
    return rung_steps(total_steps, budget=search.budget, scheduler=search.scheduler, max_rungs=search.rungs)


SHARES = (0.0625, 0.125, 0.25, 0.5)
"""Shares of the training documents for the learning curve, besides all of them: each doubles the one before, so points are
evenly spaced on a log scale. The smallest costs next to nothing, and two points more than the fitted law has parameters show
how far a point may lie from it: in simulations the resulting interval detects a gain twice as often as with one."""
MIN_CURVE_POINTS = 4
"""A law with three parameters fits any three points exactly, which leaves nothing to estimate its error from."""


def share_documents(share: float, num_documents: int) -> int:
    """Return how many documents a share contains."""
    return round(share * num_documents)


def curve_shares(num_documents: int) -> tuple[float, ...]:
    """Return the shares to train on besides all documents, of at least one document each; none if the points would be too few."""
    # Shares of a small set may round to the same number of documents; each number is trained on once.
    shares = {share_documents(share, num_documents): share for share in SHARES}
    shares = {count: share for count, share in shares.items() if 0 < count < num_documents}
    return tuple(shares.values()) if len(shares) + 1 >= MIN_CURVE_POINTS else ()


def too_few_documents(num_documents: int) -> str:
    """Return the warning that a learning curve was requested but there are too few documents."""
    return (
        f"search.learning_curve is skipped: {num_documents} training document{'' if num_documents == 1 else 's'} cannot be "
        f"divided into {MIN_CURVE_POINTS} different shares"
    )
