"""Trials that follow the search, once its winner is known: controls, other seeds, and shares of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from orchestrator.anatomy import LayerSelection
from orchestrator.data import size_of_share
from orchestrator.data.sets import load_known
from orchestrator.plan import curve_trial, curve_trial_id, repeat_control, scratch_control, shuffled_control
from orchestrator.plan.schedule import follow_up_rung_steps, share_documents, too_few_documents, total_steps, total_tokens
from orchestrator.plan.values import SweepPlan
from orchestrator.run.ledger import Ledger, TrialEntry, base_result
from orchestrator.runtime.assignments import Answer
from orchestrator.runtime.cluster import fetch
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.refit import selection_of, stands_as_it_is, steps_to_bundle
from orchestrator.transfer.learning_curve import LearningCurve, learning_curve
from orchestrator.transfer.run_view import RunView
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec


class FollowUpTrial(NamedTuple):
    trial: TrialSpec
    selection: LayerSelection
    stops: tuple[int, ...]
    """The step at which each of its rungs ends."""


def follow_up_trials(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> list[FollowUpTrial]:
    """Return the follow-up trials: the requested controls, the winner from other seeds, and its learning curve.

    Controls train for as many steps as the bundled model. With early stopping the other seeds and shares of the data are
    evaluated at the rungs of the search and stop by its rule.

    Args:
        base: The base model's scores.
    """
    plan, spec = prepared.sweep_plan, prepared.spec
    search = plan.search
    selection = selection_of(prepared, winner)
    as_long = steps_to_bundle(winner, base, prepared.scoring)
    found: list[FollowUpTrial] = []
    if "shuffled" in search.controls:
        found.append(FollowUpTrial(shuffled_control(winner.trial), selection, as_long))
    if "scratch" in search.controls and plan.scratch_memory is not None:
        found.append(FollowUpTrial(*scratch_control(plan, prepared.anatomy, spec, winner.trial), as_long))
    again = [repeat_control(winner.trial, number) for number in range(2, search.repeats + 1)]
    again += curve_trials(prepared, winner, base)
    rungs = [follow_up_rung_steps(search, winner.trial.total_steps, trial.total_steps) for trial in again]
    return found + [FollowUpTrial(trial, selection, stops) for trial, stops in zip(again, rungs, strict=True)]


def train_follow_ups(prepared: Prepared, exchange: Any, winner: TrialEntry, view: RunView) -> bool:
    """Train the follow-up trials, and report each that the GPU-hour bound stopped.

    All are submitted at once, so that the gangs share them.

    Returns:
        Whether there were any.
    """
    follow_ups = follow_up_trials(prepared, winner, base_result(prepared.run.ledger))
    if follow_ups:
        view.phase("controls", ", ".join(each.trial.trial_id for each in follow_ups))
    calls = [(each.trial, submit(exchange, *each)) for each in follow_ups]
    for trial, call in calls:
        answer = wait_for(exchange, trial.trial_id, call)
        if answer.state == "stopped" and trial.control != "curve":  # what is missing of the curve is reported with the curve
            message = f"{trial.trial_id}: {answer.reason}"
            view.event("control_left_out", message)
            prepared.run.event("control_left_out", message=message)
    return bool(follow_ups)


def submit(exchange: Any, trial: TrialSpec, selection: LayerSelection, stops: Sequence[int]) -> Any:
    """Submit a trial to the gangs; pass the returned call to `wait_for`.

    Args:
        stops: The step at which each of its rungs ends.
    """
    return exchange.carry.remote(trial, selection, tuple(stops))


def wait_for(exchange: Any, trial_id: str, call: Any) -> Answer:
    """Wait for a submitted trial to end, and return its last answer."""
    answer = fetch(call)
    fetch(exchange.finish.remote(trial_id, "failed" if answer.state == "failed" else "finished"))
    return answer


def curve_shares(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> tuple[float, ...]:
    """Return the shares of the documents that the curve's trials train on; empty where no curve is planned.

    The whole is among them where the winner had less than its full budget and was still improving.

    Args:
        base: The base model's scores.
    """
    plan = prepared.plan
    if not isinstance(plan, SweepPlan) or not plan.search.curve_shares:
        return ()
    stands = stands_as_it_is(winner, base, prepared.scoring)
    return plan.search.curve_shares if stands else (*plan.search.curve_shares, 1.0)


def curve_ids(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> list[str]:
    """Return the ids of the trials of the winner's learning curve."""
    return [curve_trial_id(share, winner.trial.trial_id) for share in curve_shares(prepared, winner, base)]


def curve_trials(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> list[TrialSpec]:
    """Return the winner as a trial on each share, for the same number of epochs."""
    spec, train = prepared.spec, load_known(prepared.data_paths.train)
    trials: list[TrialSpec] = []
    for share in curve_shares(prepared, winner, base):
        size = size_of_share(prepared.plan.data, train, share, prepared.settings.tokens_per_step, winner.trial.seed)
        trials.append(curve_trial(winner.trial, share, total_steps(spec, size), total_tokens(spec, size)))
    return trials


def curve_of(prepared: Prepared, ledger: Ledger, winner: TrialEntry | None) -> LearningCurve | str:
    """Return the promoted trial's learning curve, or why there is none; empty where it was not requested.

    Every point is the rung that its trial is compared by; the winner's is the bundled one.
    """
    search = prepared.spec.search
    if not isinstance(prepared.plan, SweepPlan) or search is None or not search.learning_curve:
        return ""
    if winner is None:
        return "no promoted trial to train on less data"
    base, num_documents = base_result(ledger), prepared.plan.data.train_documents
    shares = curve_shares(prepared, winner, base)
    if not shares:
        return too_few_documents(num_documents)
    points = [(share, ledger.get(curve_trial_id(share, winner.trial.trial_id))) for share in shares]
    points += [(1.0, winner)] if 1.0 not in shares else []
    losses: list[np.ndarray] = []
    weights = np.zeros(0)
    for share, entry in points:
        measured = entry is not None and (entry is winner or _is_measured(entry))
        found = ledger.document_losses(prepared.scoring.judged(entry.results, base)) if entry and measured else None
        if found is None or not np.isfinite(found[0]).all():
            return f"the trial on {share_documents(share, num_documents)} documents {_why_unmeasured(entry)}"
        losses.append(found[0])
        weights = found[1]
    counts = [share_documents(share, num_documents) for share, _ in points]
    return learning_curve(winner.trial.trial_id, counts, losses, weights, prepared.spec.train.seed)


def _is_measured(entry: TrialEntry) -> bool:
    """Return whether a trial ended without failing; one stopped between its rungs is not compared yet."""
    return entry.ended_for_good and bool(entry.results) and entry.results[-1].state == "done"


def _why_unmeasured(entry: TrialEntry | None) -> str:
    """Return the end of a sentence that begins with the trial."""
    if entry is None or not entry.results:
        return "did not run"
    if entry.results[-1].state == "failed":
        return f"failed: {entry.results[-1].reason}"
    if not entry.ended_for_good:
        return f"reached only step {entry.results[-1].step} of {entry.trial.total_steps}"
    return "has no finite loss on every eval document"
