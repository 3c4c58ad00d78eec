"""Bundling a trial of a run again, or one that a person promotes by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.runtime.cluster import connected, require_shared_storage
from orchestrator.runtime.finish import finish
from orchestrator.runtime.ledger import Ledger
from orchestrator.runtime.outcome import RunOutcome, write_outcome
from orchestrator.runtime.prepare import reopen
from orchestrator.store import read_json
from orchestrator.transfer.promotion import PROMOTABLE_CONTROLS
from orchestrator.transfer.records import SweepResult
from orchestrator.transfer.view import RunView


def merge_trial(run_folder: Path, trial_id: str | None, *, view: RunView, address: str | None = None) -> RunOutcome:
    """Bundle the promoted trial again, or the one that is named; the latter is recorded as promoted by hand.

    Raises:
        UsageError: no such trial, nothing promoted, or nothing to merge.
        PlanError: another node of the cluster does not see the run's folder.
    """
    prepared = reopen(run_folder.absolute())
    with prepared.run as run:
        if not run.sweep.exists():
            raise UsageError("the search has not come to its end", where=str(run.path), remedy="submit the spec again")
        sweep = SweepResult.model_validate(read_json(run.sweep))
        chosen = _chosen(sweep, Ledger(run.trials), trial_id)
        if trial_id is not None and trial_id != sweep.winner_id:
            run.event("promoted_by_hand", trial_id=chosen, instead_of=sweep.winner_id)
            reason = f"promoted by hand; by the rule: {sweep.promotion_reason}"
            sweep = sweep.model_copy(update={"winner_id": chosen, "promoted_by_hand": True, "promotion_reason": reason})
        with connected(address), _shown(view, sweep, chosen):
            require_shared_storage(run.path)
            return write_outcome(finish(prepared, sweep, view))


@contextmanager
def _shown(view: RunView, sweep: SweepResult, chosen: str) -> Iterator[None]:
    """The view, started on the one trial that is bundled, beside the untouched base; closed whatever happens."""
    view.start(
        name=sweep.name,
        metric=sweep.metric,
        higher_is_better=sweep.higher_is_better,
        max_forgetting=sweep.max_forgetting,
        num_trials=1,
    )
    try:
        for record in sweep.trials:
            if record.control == "none" or record.trial_id == chosen:
                view.trial(record)
        yield
    finally:
        view.close()


def _chosen(sweep: SweepResult, ledger: Ledger, trial_id: str | None) -> str:
    """The id of a trial that has something to merge."""
    mergeable = [
        entry.trial.trial_id
        for entry in ledger.entries()
        if entry.trial.control in PROMOTABLE_CONTROLS and entry.results and entry.results[-1].checkpoint is not None
    ]
    chosen = trial_id or sweep.winner_id
    if chosen is None:
        raise UsageError("nothing was promoted", expected="--trial ID", remedy=f"one of {', '.join(mergeable)}")
    if chosen not in mergeable:
        raise UsageError(f"no trial {chosen!r} with weights to merge", expected=", ".join(mergeable) or "none has any")
    return chosen
