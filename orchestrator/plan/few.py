"""What few examples change: one training says little of its settings, and every training soon learns them by heart."""

from __future__ import annotations

from orchestrator.plan.size import DataSize
from orchestrator.plan.steps import even_rung_steps, rung_steps
from orchestrator.spec.models import FEW_EXAMPLES, SearchSpec

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
