"""What is trained once the winner is known: its controls, itself from other seeds, and on shares of the data."""

from __future__ import annotations

from typing import Any

from orchestrator.anatomy import LayerSelection
from orchestrator.plan import repeat_control, scratch_control, shuffled_control
from orchestrator.plan.values import TrialSpec
from orchestrator.runtime.budget import selection_of
from orchestrator.runtime.carrying import hand_in, wait_for
from orchestrator.runtime.curve import curve_trials
from orchestrator.runtime.ledger import TrialEntry
from orchestrator.runtime.prepare import Prepared
from orchestrator.transfer.view import RunView


def late_trials(prepared: Prepared, winner: TrialEntry) -> list[tuple[TrialSpec, LayerSelection]]:
    """Controls that the spec asks for, the winner from as many other seeds as the plan says, and its learning curve."""
    plan, spec = prepared.plan, prepared.spec
    assert plan.search is not None
    selection = selection_of(prepared, winner)
    found: list[tuple[TrialSpec, LayerSelection]] = []
    if "shuffled" in plan.search.controls:
        found.append((shuffled_control(winner.trial), selection))
    if "scratch" in plan.search.controls and plan.scratch_memory is not None:
        found.append(scratch_control(plan, prepared.anatomy, spec, winner.trial))
    others = range(2, plan.search.repeats + 1)
    found += [(repeat_control(winner.trial, number), selection) for number in others]
    return found + [(trial, selection) for trial in curve_trials(prepared, winner)]


def train_late(prepared: Prepared, exchange: Any, winner: TrialEntry, view: RunView) -> bool:
    """Train them to the full budget that the bundle has; one that is held back for want of hours is told.

    All are handed in at once, so that the gangs share them.

    Returns:
        Whether there were any.
    """
    late = late_trials(prepared, winner)
    if late:
        view.phase("controls", ", ".join(trial.trial_id for trial, _ in late))
    calls = [(trial, hand_in(exchange, trial, selection, [trial.total_steps])) for trial, selection in late]
    for trial, call in calls:
        answer = wait_for(exchange, trial.trial_id, call)
        if answer.state == "stopped" and trial.control != "curve":  # of the curve, what is missing is told where it is drawn
            message = f"{trial.trial_id}: {answer.reason}"
            view.event("control_left_out", message)
            prepared.run.event("control_left_out", message=message)
    return bool(late)
