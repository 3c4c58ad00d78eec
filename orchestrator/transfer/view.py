"""Who watches a run, as the runtime sees them."""

from __future__ import annotations

from typing import Protocol

from orchestrator.transfer.records import TrialRecord


class RunView(Protocol):
    """Whoever watches a run: a terminal, a log, a script. The run calls, the view shows; a view never raises."""

    def start(self, *, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
        """The run is planned and begins; `num_trials` counts the searched trials, without controls."""
        ...

    def phase(self, name: str, detail: str = "") -> None:
        """A new stretch of the run: `data`, `gangs`, `search`, `refit`, `merge`, `verify`, `test`, `report`."""
        ...

    def trial(self, record: TrialRecord) -> None:
        """A trial started, reached a rung, or ended; the whole record, every time."""
        ...

    def event(self, kind: str, message: str, **fields: object) -> None:
        """Anything automatic that the run record also gets: a micro-batch halved, a gang replaced, a trial retried."""
        ...

    def close(self) -> None:
        """The run has ended, well or not."""
        ...
