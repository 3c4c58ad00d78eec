"""Bundle a trial of a run again, or one that a person promotes by hand."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.run.ledger import Ledger
from orchestrator.run.records import RunOutcome, judge_trials, write_outcome
from orchestrator.runtime.cluster import connected, require_shared_storage
from orchestrator.runtime.failures import in_plain_words
from orchestrator.runtime.finish import finish
from orchestrator.runtime.prepare import reopen
from orchestrator.runtime.ray_health import guarded
from orchestrator.runtime.run_progress import ProgressReporter
from orchestrator.store import read_record
from orchestrator.transfer.promotion import PROMOTABLE_CONTROLS
from orchestrator.transfer.records import BY_THE_RULE, SweepResult
from orchestrator.transfer.run_view import RunView
from orchestrator.transfer.trial_lookup import find_trial

_NOT_BY_THE_RULE = "it is measured only for a trial promoted by the rule"


def merge_trial(
    run_folder: Path, trial_id: str | None, *, promote: bool = False, view: RunView, address: str | None = None
) -> RunOutcome:
    """Bundle the promoted trial again; with `promote`, bundle the named one and record it as promoted by hand.

    Raises:
        UsageError: there is no such trial, it failed or is a control, or it is not the promoted one.
        PlanError: another node of the cluster cannot read the run's folder.
    """
    prepared = reopen(run_folder.absolute())
    with prepared.run as run:
        if not run.sweep.exists():
            raise UsageError("the search has not finished", where=str(run.path), remedy="submit the spec again")
        sweep = read_record(run.sweep, SweepResult)
        chosen = choose(sweep, run.ledger, trial_id, promote=promote)
        before = sweep.winner_id
        if chosen != before:
            sweep = promoted_by_hand(sweep, chosen)
        with ProgressReporter(view, run.path) as reporter, connected(address), guarded(run.path), in_plain_words(run.path):
            _show(reporter, sweep, chosen)
            require_shared_storage(run.path)
            outcome = write_outcome(finish(prepared, sweep, judge_trials(run.ledger, prepared.scoring), reporter))
        if chosen != before:
            run.event("promoted_by_hand", trial_id=chosen, instead_of=before)
        return outcome


def promoted_by_hand(sweep: SweepResult, trial_id: str) -> SweepResult:
    """Return the summary with another trial promoted.

    The reason by the rule is kept, however often a person promotes. So is the learning curve, which is shown only while its own
    trial is the promoted one.

    Raises:
        UsageError: the trial is not in the summary yet.
    """
    rule = sweep.rule_reason if sweep.promoted_by_hand else sweep.promotion_reason
    label = next((trial.label for trial in sweep.trials if trial.trial_id == trial_id), None)
    if label is None:
        remedy = "submit the spec again: the search then finishes"
        raise UsageError(f"trial {trial_id} was added after the search results were last written", remedy=remedy)
    reason = f"promoted by hand: {label}{BY_THE_RULE}{rule}"
    update = {"winner_id": trial_id, "promoted_by_hand": True, "promotion_reason": reason, "rule_reason": rule}
    if sweep.learning_curve is not None or sweep.no_learning_curve:
        curve = sweep.learning_curve
        of = f"it was measured for {curve.trial_id}, before another was promoted by hand" if curve else _NOT_BY_THE_RULE
        update |= {"no_learning_curve": "" if curve is not None and curve.trial_id == trial_id else of}
    return sweep.model_copy(update=update)


def _show(view: RunView, sweep: SweepResult, chosen: str) -> None:
    """Start the view with the bundled trial and the base model."""
    view.start(
        name=sweep.name,
        metric=sweep.metric,
        higher_is_better=sweep.higher_is_better,
        max_forgetting=sweep.max_forgetting,
        num_trials=1,
    )
    for record in sweep.trials:
        if record.control == "none" or record.trial_id == chosen:
            view.trial(record)


def choose(sweep: SweepResult, ledger: Ledger, trial_id: str | None, *, promote: bool) -> str:
    """Return the id of the trial to merge: the promoted one, or with `promote` another, given by id or number.

    Raises:
        UsageError: as in `merge_trial`.
    """
    mergeable = [
        entry.trial.trial_id
        for entry in ledger.entries()
        if entry.trial.control in PROMOTABLE_CONTROLS and entry.results and entry.results[-1].checkpoint is not None
    ]
    known = ", ".join(mergeable) or "none has weights to merge"
    if promote and trial_id is None:
        raise UsageError("--promote names no trial", expected=f"--trial ID, one of {known}")
    numbers = {entry.trial.trial_id: entry.trial.number for entry in ledger.entries()}
    chosen = find_trial(trial_id, numbers) if trial_id is not None else sweep.winner_id
    if chosen is None:
        raise UsageError("nothing was promoted", expected="--trial ID --promote", remedy=f"one of {known}")
    entry = ledger.get(chosen)
    if entry is None:
        raise UsageError(f"no trial {chosen!r}", expected=known)
    if entry.trial.control not in PROMOTABLE_CONTROLS:
        raise UsageError(f"{chosen} is the control {entry.trial.control}, not a candidate", expected=known)
    if entry.end is not None and entry.end.state == "failed":
        raise UsageError(f"trial {chosen} failed: {entry.end.reason}", expected=known)
    if chosen not in mergeable:
        raise UsageError(f"trial {chosen} has no weights to merge", expected=known)
    if chosen != sweep.winner_id and not promote:
        instead = f"{sweep.winner_id} is" if sweep.winner_id else "nothing is"
        raise UsageError(f"{chosen} is not promoted: {instead}", remedy="add --promote to promote it by hand; the run records it")
    return chosen
