"""Whether the search may still give out work, by `resources.max_gpu_hours`."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.plan.values import TrialSpec
from orchestrator.runtime.hours import HoursState, Meter, is_spent, refit_hours
from orchestrator.runtime.ledger import Ledger
from orchestrator.runtime.records import base_result
from orchestrator.runtime.scoring import Scoring


class Allowance:
    """Says no once, and stays with it: what is left is for the refit of the best trial so far.

    Args:
        tell: Called with a sentence, the one time that the bound is reached.
    """

    def __init__(
        self, meter: Meter, max_hours: float | None, ledger: Ledger, scoring: Scoring, tell: Callable[[str], None]
    ) -> None:
        self._meter = meter
        self._max_hours = max_hours
        self._ledger = ledger
        self._scoring = scoring
        self._tell = tell
        self.reason = ""
        """Why no more work is given out; empty until then."""

    def refuses(self, trial: TrialSpec | None = None) -> bool:
        """Whether this trial, or any new one, gets no more work; the untouched base is measured all the same."""
        if trial is not None and trial.control == "none":
            return False
        if not self.reason and self._max_hours is not None:
            used, refit = self._meter.used_hours, self._refit_hours()
            if is_spent(used, self._max_hours, refit):
                kept = f", and the refit will take about {refit:.3g}" if used < self._max_hours else ""
                self.reason = f"resources.max_gpu_hours: {self._max_hours:g} is reached: {used:.3g} rank-hours used{kept}"
                self._tell(f"{self.reason}; running rungs finish, and the best trial so far is promoted")
        return bool(self.reason)

    def state(self) -> HoursState:
        return HoursState(used=self._meter.used_hours, spent=self.reason)

    def _refit_hours(self) -> float:
        """What the refit of the best trial so far will take."""
        base = base_result(self._ledger)
        entries = [entry for entry in self._ledger.entries() if entry.trial.control is None and entry.results]
        scoring = self._scoring
        best = min(entries, key=lambda entry: scoring.score(scoring.judged(entry.results, base), base), default=None)
        if best is None or scoring.stalled(best.results, base):
            return 0.0
        return refit_hours(best.results, best.trial.total_steps)
