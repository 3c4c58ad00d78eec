"""What few examples change: one training of the winner says little of its settings."""

from __future__ import annotations

from orchestrator.plan.size import DataSize
from orchestrator.spec.models import FEW_EXAMPLES, SearchSpec

AUTO_REPEATS = 5
"""Trainings of the winner, each from another seed: Student's t has 4 degrees of freedom then, and its 95% interval is 2.8
standard errors wide to either side; with 3 trainings it were 4.3."""


def has_few(data: DataSize) -> bool:
    return data.train_documents <= FEW_EXAMPLES


def num_repeats(search: SearchSpec, data: DataSize) -> int:
    """From how many seeds the promoted trial is trained in all."""
    if search.repeats == "auto":
        return AUTO_REPEATS if has_few(data) else 1
    return search.repeats
