"""Who watches a run, as the runtime sees them."""

from __future__ import annotations

from typing import Protocol

from orchestrator.transfer.records import TrialRecord
from orchestrator.values import Value


class Activity(Value):
    """One thing that is being done at this moment: by a worker group (gang), by the refit, or by the bundling worker."""

    doing: str
    """`training`, `scoring`, `loading the base model`, `waiting for free places`, ..."""
    gang: int | None = None
    """None outside the search."""
    trial_id: str = ""
    step: int = 0
    """Last step that stands in the trial's steps.jsonl."""
    stop_step: int = 0
    """Where this stretch of training ends; 0 where nothing is trained."""
    total_steps: int = 0
    """Of the trial's full budget."""
    loss: float | None = None
    """Of the last step, nats per supervised token."""
    tokens_per_s: float | None = None
    """Over the last steps."""
    seconds_left: float | None = None
    """To `stop_step`, at the rate of the last steps; scoring and saving come on top."""


class Progress(Value):
    """What a run is waiting for at this moment; also the file progress.json of a run in progress."""

    phase: str
    detail: str = ""
    phase_seconds: float = 0.0
    """How long the phase has lasted."""
    run_seconds: float = 0.0
    activities: tuple[Activity, ...] = ()
    seconds_left: float | None = None
    """Until the phase ends, as far as that can be estimated."""
    at: float = 0.0
    """Unix time."""
    last_event: str = ""
    ended: bool = False
    """The run's driver has come to its end; in progress.json alone."""
    error: str = ""
    """Why it ended before the run did."""


class RunView(Protocol):
    """Whoever watches a run: a terminal, a log, a script. The run calls, the view shows; a view never raises.

    Calls come from several threads, one at a time.
    """

    def start(self, *, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
        """The run is planned and begins; `num_trials` counts the searched trials, without controls."""
        ...

    def phase(self, name: str, detail: str = "") -> None:
        """A new stretch of the run: `data`, `plan`, `gangs`, `probe`, `search`, `refit`, `merge`, `verify`, `test`.

        The first one comes before `start`.
        """
        ...

    def progress(self, now: Progress) -> None:
        """What is awaited; called about once a second, whatever else happens."""
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
