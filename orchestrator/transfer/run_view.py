"""The interface through which the runtime reports its progress to a terminal, a log or a script."""

from __future__ import annotations

from typing import Protocol

from orchestrator.transfer.records import TrialRecord
from orchestrator.values import Value


class Activity(Value):
    """Work in progress of a worker group (gang), the refit, or the bundling worker."""

    doing: str
    """`training`, `scoring`, `loading the base model`, `waiting for free places`, ..."""
    gang: int | None = None
    """None outside the search."""
    trial_id: str = ""
    step: int = 0
    """Last step in the trial's steps.jsonl."""
    stop_step: int = 0
    """Step at which this stretch of training ends; 0 if nothing is trained."""
    total_steps: int = 0
    """Steps of the trial's full budget."""
    loss: float | None = None
    """Loss of the last step, nats per supervised token."""
    tokens_per_s: float | None = None
    """Throughput of the last steps."""
    seconds_left: float | None = None
    """Estimated time to `stop_step` at the rate of the last steps, without scoring and saving."""


class Progress(Value):
    """Current activities of a run; progress.json holds it while the run is in progress."""

    phase: str
    detail: str = ""
    phase_seconds: float = 0.0
    """Time since the phase began."""
    run_seconds: float = 0.0
    activities: tuple[Activity, ...] = ()
    seconds_left: float | None = None
    """Estimated time until the phase ends; None if unknown."""
    at: float = 0.0
    """Unix time."""
    last_event: str = ""
    ended: bool = False
    """True if the run's driver has ended; set in progress.json only."""
    error: str = ""
    """Error that ended the driver before the run was finished."""


class RunView(Protocol):
    """Observer of a run: a terminal, a log or a script. The run calls it; a view never raises.

    Calls come from several threads, one at a time.
    """

    def start(self, *, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
        """Show that the run is planned and begins; `num_trials` counts the searched trials, without controls."""
        ...

    def phase(self, name: str, detail: str = "") -> None:
        """Show a new phase of the run: `data`, `plan`, `gangs`, `probe`, `search`, `refit`, `merge`, `verify`, `test`.

        The first one comes before `start`.
        """
        ...

    def progress(self, now: Progress) -> None:
        """Show the current activities; called about once a second."""
        ...

    def trial(self, record: TrialRecord) -> None:
        """Show a trial that started, reached a rung, or ended; gets the whole record each time."""
        ...

    def event(self, kind: str, message: str, **fields: object) -> None:
        """Show an event of the run record: a micro-batch halved, a gang replaced, a trial retried."""
        ...

    def close(self) -> None:
        """Show that the run has ended, successfully or not."""
        ...
