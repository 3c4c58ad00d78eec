"""The learning curve: the promoted trial once more on shares of its data, and the law through what came of it."""

from __future__ import annotations

import numpy as np

from orchestrator.data import TokenizedSet, size_of_share
from orchestrator.plan import curve_trial, curve_trial_id
from orchestrator.plan.curve import share_documents, too_few_documents
from orchestrator.plan.steps import total_steps, total_tokens
from orchestrator.plan.values import TrialSpec
from orchestrator.runtime.ledger import Ledger, TrialEntry
from orchestrator.runtime.prepare import Prepared
from orchestrator.transfer.learning_curve import LearningCurve, learning_curve


def curve_shares(prepared: Prepared, winner: TrialEntry) -> tuple[float, ...]:
    """Of the documents, what trials of the curve learn from: of all of them too, where the winner has not had its full budget.
    None where no curve is planned."""
    search = prepared.plan.search
    if search is None or not search.curve_shares:
        return ()
    has_full_budget = winner.results[-1].step >= winner.trial.total_steps
    return search.curve_shares if has_full_budget else (*search.curve_shares, 1.0)


def curve_ids(prepared: Prepared, winner: TrialEntry) -> list[str]:
    """Of the trials of the winner's curve."""
    return [curve_trial_id(share, winner.trial.trial_id) for share in curve_shares(prepared, winner)]


def curve_trials(prepared: Prepared, winner: TrialEntry) -> list[TrialSpec]:
    """The winner on each share, for as many epochs."""
    spec, train = prepared.spec, TokenizedSet.load(prepared.data_paths.train)
    trials: list[TrialSpec] = []
    for share in curve_shares(prepared, winner):
        size = size_of_share(prepared.plan.data, train, share, spec.train.tokens_per_step, winner.trial.seed)
        trials.append(curve_trial(winner.trial, share, total_steps(spec, size), total_tokens(spec, size)))
    return trials


def curve_of(prepared: Prepared, ledger: Ledger, winner: TrialEntry | None) -> LearningCurve | str:
    """The promoted trial's curve, or why there is none; nothing where none was asked for."""
    search = prepared.spec.search
    if prepared.plan.search is None or search is None or not search.learning_curve:
        return ""
    if winner is None:
        return "nothing was promoted that could be trained on less"
    shares, num_documents = curve_shares(prepared, winner), prepared.plan.data.train_documents
    if not shares:
        return too_few_documents(num_documents)
    points = [(share, ledger.get(curve_trial_id(share, winner.trial.trial_id))) for share in shares]
    points += [(1.0, winner)] if 1.0 not in shares else []
    losses: list[np.ndarray] = []
    weights = np.zeros(0)
    for share, entry in points:
        found = ledger.document_losses(entry.results[-1]) if entry is not None and _is_measured(entry) else None
        if found is None or not np.isfinite(found[0]).all():
            return f"the trial on {share_documents(share, num_documents)} documents {_what_befell(entry)}"
        losses.append(found[0])
        weights = found[1]
    counts = [share_documents(share, num_documents) for share, _ in points]
    return learning_curve(winner.trial.trial_id, counts, losses, weights, prepared.spec.train.seed)


def _is_measured(entry: TrialEntry) -> bool:
    return bool(entry.results) and entry.results[-1].state == "done"


def _what_befell(entry: TrialEntry | None) -> str:
    if entry is None or not entry.results:
        return "did not run"
    if not _is_measured(entry):
        return f"failed: {entry.results[-1].reason}"
    return "has no finite loss on every eval document"
