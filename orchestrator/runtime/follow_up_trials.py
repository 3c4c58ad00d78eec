"""Trials that follow the search, once its winner is known: controls, other seeds, and shares of the data.

The trials depend only on the judged winner; `train_follow_ups` then trains it, and `measure_curve` evaluates it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from orchestrator.anatomy import LayerSelection
from orchestrator.data import size_of_share
from orchestrator.data.sets import load_known
from orchestrator.plan import curve_trial, curve_trial_id, repeat_control, scratch_control, shuffled_control
from orchestrator.plan.schedule import follow_up_rung_steps, share_documents, too_few_documents, total_steps, total_tokens
from orchestrator.plan.values import RunPlan, SweepPlan
from orchestrator.run.records import JudgedTrial
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.refit import selection_of
from orchestrator.runtime.search import submit, wait_for
from orchestrator.transfer.learning_curve import LearningCurve, learning_curve
from orchestrator.transfer.run_view import RunView
from orchestrator.work.trial import TrialSpec


class FollowUpTrial(NamedTuple):
    trial: TrialSpec
    selection: LayerSelection
    stops: tuple[int, ...]
    """The step at which each of its rungs ends."""


def follow_up_trials(prepared: Prepared, winner: JudgedTrial) -> list[FollowUpTrial]:
    """Return the follow-up trials: the requested controls, the winner from other seeds, and its learning curve.

    Controls train for as many steps as the bundled model. With early stopping the other seeds and shares of the data are
    evaluated at the rungs of the search and stop by its rule.
    """
    plan, search, trial = prepared.sweep_plan, prepared.sweep_plan.search, winner.trial
    again = [repeat_control(trial, number) for number in range(2, search.repeats + 1)]
    again += curve_trials(prepared, winner)
    rungs = [follow_up_rung_steps(search, trial.total_steps, each.total_steps) for each in again]
    selection = selection_of(prepared, winner.entry)
    found: list[FollowUpTrial] = []
    if "shuffled" in search.controls:
        found.append(FollowUpTrial(shuffled_control(trial), selection, winner.bundled_steps))
    if "scratch" in search.controls and plan.scratch_memory is not None:
        found.append(FollowUpTrial(*scratch_control(plan, prepared.anatomy, prepared.spec, trial), winner.bundled_steps))
    return found + [FollowUpTrial(each, selection, stops) for each, stops in zip(again, rungs, strict=True)]


def curve_trials(prepared: Prepared, winner: JudgedTrial) -> list[TrialSpec]:
    """Return the winner as a trial on each share of the documents, for the same number of epochs."""
    spec, trial = prepared.spec, winner.trial
    shares = curve_shares(prepared.plan, winner)
    train = load_known(prepared.data_paths.train)
    trials: list[TrialSpec] = []
    for share in shares:
        size = size_of_share(prepared.plan.data, train, share, prepared.settings.tokens_per_step, trial.seed)
        trials.append(curve_trial(trial, share, total_steps(spec, size), total_tokens(spec, size)))
    return trials


def curve_shares(plan: RunPlan, winner: JudgedTrial) -> tuple[float, ...]:
    """Return the shares of the documents that the curve's trials train on; empty where no curve is planned.

    The whole is among them where the winner had less than its full budget and was still improving.
    """
    if not isinstance(plan, SweepPlan) or not plan.search.curve_shares:
        return ()
    return (*plan.search.curve_shares, 1.0) if winner.needs_refit else plan.search.curve_shares


def train_follow_ups(prepared: Prepared, exchange: Any, follow_ups: Sequence[FollowUpTrial], view: RunView) -> None:
    """Train the follow-up trials, and report each that the GPU-hour bound stopped.

    All are submitted at once, so that the gangs share them.
    """
    view.phase("controls", ", ".join(each.trial.trial_id for each in follow_ups))
    calls = [(each.trial, submit(exchange, *each)) for each in follow_ups]
    for trial, call in calls:
        answer = wait_for(exchange, trial.trial_id, call)
        if answer.state == "stopped" and trial.control != "curve":  # what is missing of the curve is reported with the curve
            message = f"{trial.trial_id}: {answer.reason}"
            view.event("control_left_out", message)
            prepared.run.event("control_left_out", message=message)


class MeasuredCurve(NamedTuple):
    """The promoted trial's learning curve, or why there is none."""

    trial_ids: tuple[str, ...] = ()
    """The trials that it needs in addition to the promoted one."""
    curve: LearningCurve | None = None
    missing: str = ""
    """Why there is none; empty where it was not requested."""


def measure_curve(prepared: Prepared, trials: Mapping[str, JudgedTrial], winner: JudgedTrial | None) -> MeasuredCurve:
    """Return the promoted trial's learning curve.

    Every point is the rung that its trial is compared by; the winner's is the bundled one.
    """
    plan, search, num_documents = prepared.plan, prepared.spec.search, prepared.plan.data.train_documents
    if not isinstance(plan, SweepPlan) or search is None or not search.learning_curve:
        return MeasuredCurve()
    if winner is None:
        return MeasuredCurve(missing="no promoted trial to train on less data")
    shares = curve_shares(plan, winner)
    if not shares:
        return MeasuredCurve(missing=too_few_documents(num_documents))
    ids = tuple(curve_trial_id(share, winner.trial.trial_id) for share in shares)
    points = [(share, trials.get(trial_id)) for share, trial_id in zip(shares, ids, strict=True)]
    points += [(1.0, winner)] if 1.0 not in shares else []
    losses: list[np.ndarray] = []
    weights = np.zeros(0)
    for share, trial in points:
        found = trial.losses if trial is not None and (trial is winner or _is_measured(trial)) else None
        if found is None or not np.isfinite(found[0]).all():
            why = f"the trial on {share_documents(share, num_documents)} documents {_why_unmeasured(trial)}"
            return MeasuredCurve(ids, missing=why)
        losses.append(found[0])
        weights = found[1]
    counts = [share_documents(share, num_documents) for share, _ in points]
    return MeasuredCurve(ids, learning_curve(winner.trial.trial_id, counts, losses, weights, prepared.spec.train.seed))


def _is_measured(trial: JudgedTrial) -> bool:
    """Return whether a trial ended without failing; one stopped between its rungs is not compared yet."""
    entry = trial.entry
    return entry.ended_for_good and bool(entry.results) and entry.results[-1].state == "done"


def _why_unmeasured(trial: JudgedTrial | None) -> str:
    """Return the end of a sentence that begins with the trial."""
    if trial is None or not trial.entry.results:
        return "did not run"
    entry = trial.entry
    if entry.results[-1].state == "failed":
        return f"failed: {entry.results[-1].reason}"
    if not entry.ended_for_good:
        return f"reached only step {entry.results[-1].step} of {entry.trial.total_steps}"
    return "has no finite loss on every eval document"
