"""What a gang measures before the search, outside the ledger."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.plan.results import RungResult
from orchestrator.plan.values import Assignment
from orchestrator.runtime.prepare import Prepared

Measure = Callable[[Assignment], RungResult | None]
"""Has an assignment run somewhere."""


def measured(prepared: Prepared, assignment: Assignment, measure: Measure) -> RungResult:
    """What came of it; its notes are in the run's record."""
    result = measure(assignment)
    assert result is not None, "a control's work is never held back"
    trial_id = assignment.trial.trial_id
    for note in result.notes:
        prepared.run.event("trial_note", message=f"{trial_id}: {note}", trial_id=trial_id)
    return result
