"""What is trained once the winner is known: its controls, itself from other seeds, and on shares of the data."""

from __future__ import annotations

from typing import Any, NamedTuple

from orchestrator.anatomy import LayerSelection
from orchestrator.plan import repeat_control, scratch_control, shuffled_control
from orchestrator.plan.results import RungResult
from orchestrator.plan.steps import late_rung_steps
from orchestrator.plan.values import TrialSpec
from orchestrator.runtime.budget import selection_of, steps_to_bundle
from orchestrator.runtime.carrying import hand_in, wait_for
from orchestrator.runtime.curve import curve_trials
from orchestrator.runtime.ledger import Ledger, TrialEntry
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.records import base_result
from orchestrator.transfer.view import RunView


class LateTrial(NamedTuple):
    trial: TrialSpec
    selection: LayerSelection
    stops: tuple[int, ...]
    """The step at which each of its rungs ends."""


def late_trials(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> list[LateTrial]:
    """Controls that the spec asks for, trained as long as what will be bundled, the winner from as many other seeds as the plan
    says, and its learning curve. With early stopping other seeds and shares of the data are scored where the searched trials
    are, and end where these would.

    Args:
        base: What the untouched base scored.
    """
    plan, spec, search = prepared.plan, prepared.spec, prepared.plan.search
    assert search is not None
    selection = selection_of(prepared, winner)
    as_long = steps_to_bundle(winner, base, prepared.scoring)
    found: list[LateTrial] = []
    if "shuffled" in search.controls:
        found.append(LateTrial(shuffled_control(winner.trial), selection, as_long))
    if "scratch" in search.controls and plan.scratch_memory is not None:
        found.append(LateTrial(*scratch_control(plan, prepared.anatomy, spec, winner.trial), as_long))
    again = [repeat_control(winner.trial, number) for number in range(2, search.repeats + 1)]
    again += curve_trials(prepared, winner, base)
    rungs = [late_rung_steps(search, winner.trial.total_steps, trial.total_steps) for trial in again]
    return found + [LateTrial(trial, selection, stops) for trial, stops in zip(again, rungs, strict=True)]


def train_late(prepared: Prepared, exchange: Any, winner: TrialEntry, view: RunView) -> bool:
    """Train them; one that is held back for want of hours is told.

    All are handed in at once, so that the gangs share them.

    Returns:
        Whether there were any.
    """
    late = late_trials(prepared, winner, base_result(Ledger(prepared.run.trials)))
    if late:
        view.phase("controls", ", ".join(each.trial.trial_id for each in late))
    calls = [(each.trial, hand_in(exchange, *each)) for each in late]
    for trial, call in calls:
        answer = wait_for(exchange, trial.trial_id, call)
        if answer.state == "stopped" and trial.control != "curve":  # of the curve, what is missing is told where it is drawn
            message = f"{trial.trial_id}: {answer.reason}"
            view.event("control_left_out", message)
            prepared.run.event("control_left_out", message=message)
    return bool(late)
