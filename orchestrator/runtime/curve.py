"""The learning curve: the promoted trial once more on shares of its data, and the law through what came of it."""

from __future__ import annotations

import numpy as np

from orchestrator.data import size_of_share
from orchestrator.data.known import load_known
from orchestrator.plan import curve_trial, curve_trial_id
from orchestrator.plan.curve import share_documents, too_few_documents
from orchestrator.plan.results import RungResult
from orchestrator.plan.steps import total_steps, total_tokens
from orchestrator.plan.values import TrialSpec
from orchestrator.runtime.budget import stands_as_it_is
from orchestrator.runtime.ledger import Ledger, TrialEntry
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.records import base_result
from orchestrator.transfer.learning_curve import LearningCurve, learning_curve


def curve_shares(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> tuple[float, ...]:
    """Of the documents, what trials of the curve learn from: of all of them too, where the winner has neither had its full budget
    nor stopped getting better. None where no curve is planned.

    Args:
        base: What the untouched base scored.
    """
    search = prepared.plan.search
    if search is None or not search.curve_shares:
        return ()
    stands = stands_as_it_is(winner, base, prepared.scoring)
    return search.curve_shares if stands else (*search.curve_shares, 1.0)


def curve_ids(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> list[str]:
    """Of the trials of the winner's curve."""
    return [curve_trial_id(share, winner.trial.trial_id) for share in curve_shares(prepared, winner, base)]


def curve_trials(prepared: Prepared, winner: TrialEntry, base: RungResult | None) -> list[TrialSpec]:
    """The winner on each share, for as many epochs."""
    spec, train = prepared.spec, load_known(prepared.data_paths.train)
    trials: list[TrialSpec] = []
    for share in curve_shares(prepared, winner, base):
        size = size_of_share(prepared.plan.data, train, share, prepared.settings.tokens_per_step, winner.trial.seed)
        trials.append(curve_trial(winner.trial, share, total_steps(spec, size), total_tokens(spec, size)))
    return trials


def curve_of(prepared: Prepared, ledger: Ledger, winner: TrialEntry | None) -> LearningCurve | str:
    """The promoted trial's curve, or why there is none; nothing where none was asked for. Every point is of the rung that its
    trial is judged by, the winner's of the one that is bundled."""
    search = prepared.spec.search
    if prepared.plan.search is None or search is None or not search.learning_curve:
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
            return f"the trial on {share_documents(share, num_documents)} documents {_what_befell(entry)}"
        losses.append(found[0])
        weights = found[1]
    counts = [share_documents(share, num_documents) for share, _ in points]
    return learning_curve(winner.trial.trial_id, counts, losses, weights, prepared.spec.train.seed)


def _is_measured(entry: TrialEntry) -> bool:
    """Whether it came to its end, and well: one held back between its rungs is not yet judged."""
    return entry.ended_for_good and bool(entry.results) and entry.results[-1].state == "done"


def _what_befell(entry: TrialEntry | None) -> str:
    if entry is None or not entry.results:
        return "did not run"
    if entry.results[-1].state == "failed":
        return f"failed: {entry.results[-1].reason}"
    if not entry.ended_for_good:
        return f"reached only step {entry.results[-1].step} of {entry.trial.total_steps}"
    return "has no finite loss on every eval document"
