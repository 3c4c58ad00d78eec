"""GPU-hours: how many a run has used over all its submissions, and whether its search may start more work.

A rank-hour is an hour in which the run holds a rank's resources, busy or idle: on a GPU, a GPU-hour. Without GPUs a rank-hour
counts the same, so that `resources.max_gpu_hours` works there too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, NonNegativeFloat

from orchestrator.run.ledger import Ledger, base_result
from orchestrator.run.scoring import Scoring
from orchestrator.store import read_record, write_json
from orchestrator.values import Value
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

SAVE_EVERY_S = 5.0
"""Seconds between saves: a killed process loses at most this much of the count."""
MOST_FOR_THE_REFIT = 0.5
"""Share of the bound: no hours are reserved for a longer refit; the promoted trial's own last rung is bundled instead."""


logger = logging.getLogger(__name__)


class HoursState(Value):
    """The hours at the end of the search, as the exchange reports them."""

    used: float
    spent: str = ""
    """Why no more work was started; empty where the bound was not reached."""


class HoursRecord(Value):
    """hours.json."""

    used: NonNegativeFloat = Field(allow_inf_nan=False)


class Meter:
    """Counts the rank-hours of reserved resources, added to those of earlier submissions.

    One process at a time counts for a run: the exchange during the search, the driver after it.

    Args:
        file: hours.json, written every SAVE_EVERY_S while the meter is open.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._seconds = 3600 * read_hours(file)
        self._held: dict[object, tuple[int, float]] = {}
        self._closed = threading.Event()
        self._saver = threading.Thread(target=self._save_now_and_then, name="hours", daemon=True)

    def open(self) -> None:
        self._saver.start()

    def close(self) -> None:
        self._closed.set()
        self._saver.join()
        self._save()

    def hold(self, what: object, num_ranks: int) -> None:
        """Start counting ranks, under the key `what`."""
        self._held[what] = (num_ranks, self._clock())

    def release(self, what: object) -> None:
        """Stop counting what `hold` started to count; does nothing for an unknown key."""
        num_ranks, since = self._held.get(what, (0, 0.0))
        self._seconds += num_ranks * (
            self._clock() - since
        )  # before the pop: a save between the two counts twice rather than not at all
        self._held.pop(what, None)

    @property
    def used_hours(self) -> float:
        now = self._clock()
        held = sum(num_ranks * (now - since) for num_ranks, since in tuple(self._held.values()))
        return (self._seconds + held) / 3600

    def _save_now_and_then(self) -> None:
        while not self._closed.wait(SAVE_EVERY_S):
            try:
                self._save()
            except OSError as error:  # a full disk, for instance: a later save may succeed, and `close` raises if it does not
                logger.warning("the GPU-hours were not written to disk: %s", error)

    def _save(self) -> None:
        write_json(self._file, HoursRecord(used=self.used_hours))


@contextmanager
def metered(file: Path, num_ranks: int) -> Iterator[None]:
    """Count `num_ranks` ranks while the block runs."""
    meter = Meter(file)
    meter.open()
    meter.hold("driver", num_ranks)
    try:
        yield
    finally:
        meter.release("driver")
        meter.close()


def read_hours(file: Path) -> float:
    """Read the rank-hours that a run has used."""
    return read_record(file, HoursRecord).used if file.exists() else 0.0


def refit_hours(results: Sequence[RungResult], total_steps: int) -> float:
    """Return the expected rank-hours of a trial's refit, at the trial's measured speed; 0 where it had the full budget.

    The measured speed is used because the plan's is an estimate.
    """
    done = [result for result in results if result.state == "done"]
    if not done or not 0 < done[-1].step < total_steps:
        return 0.0
    seconds_per_step = sum(result.train_seconds for result in done) / done[-1].step
    # All steps count: a refit starts at step 0, not from the trial's last rung.
    return _ranks(done[-1]) * seconds_per_step * total_steps / 3600


def affords_refit(expected_hours: float, max_hours: float | None) -> bool:
    """Return whether a refit is short enough for hours to be reserved for it."""
    return max_hours is None or expected_hours <= MOST_FOR_THE_REFIT * max_hours


def is_left_for_refit(expected_hours: float, used_hours: float, max_hours: float | None, slack_hours: float) -> bool:
    """Return whether the rest of the bound is enough for the rest of the refit.

    Args:
        slack_hours: The most that the rungs in progress took after the search had reserved the rest for the refit.
    """
    return max_hours is None or used_hours + expected_hours <= max_hours + slack_hours


def why_no_refit(
    results: Sequence[RungResult], total_steps: int, begun: int, *, used_hours: float, max_hours: float | None, num_gangs: int
) -> str:
    """Return why the bound does not allow a trial's refit; empty where it does.

    Args:
        begun: The steps of the refit that an earlier submission has trained.
        num_gangs: How many rungs may have been in progress after the search had reserved the rest for the refit.
    """
    if max_hours is None:
        return ""
    expected = refit_hours(results, total_steps)
    if not affords_refit(expected, max_hours):
        return f"the refit to {total_steps} steps would take about {expected:.3g} of max_gpu_hours: {max_hours:g}"
    to_come = expected * (1 - begun / total_steps)
    if is_left_for_refit(to_come, used_hours, max_hours, num_gangs * rung_hours(results)):
        return ""
    return (
        f"the refit to {total_steps} steps would take about {to_come:.3g} more, and {used_hours:.3g} of max_gpu_hours: "
        f"{max_hours:g} are used"
    )


def rung_hours(results: Sequence[RungResult]) -> float:
    """Return the rank-hours of a trial's longest rung, with its evaluation."""
    return max((_ranks(result) * (result.train_seconds + result.eval_seconds) for result in results), default=0.0) / 3600


def is_spent(used_hours: float, max_hours: float | None, expected_refit_hours: float = 0.0) -> bool:
    """Return whether no more work may be started: the rest is reserved for the refit of the best trial so far."""
    if max_hours is None:
        return False
    reserve = expected_refit_hours if affords_refit(expected_refit_hours, max_hours) else 0.0
    return used_hours + reserve >= max_hours


def may_go_on(earlier_max_hours: float | None, used_hours: float, max_hours: float | None) -> bool:
    """Return whether a search that its bound ended may continue: the bound was raised beyond the hours used."""
    return max_hours is None or max_hours > max(earlier_max_hours or 0.0, used_hours)


def _ranks(result: RungResult) -> int:
    return result.engine.ranks if result.engine is not None else 1


class Allowance:
    """Decides whether a trial may get more work. Once it refuses, it keeps refusing: the rest is for the refit of the best trial.

    Args:
        tell: Called with a sentence, once, when the bound is reached.
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
        """Why no more work is started; empty while work is allowed."""

    def refuses(self, trial: TrialSpec | None = None) -> bool:
        """Return whether this trial, or any new one, gets no more work. The base model is always evaluated."""
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
        """Return the expected rank-hours of the refit of the best trial so far."""
        base = base_result(self._ledger)
        entries = [entry for entry in self._ledger.entries() if entry.trial.control is None and entry.results]
        scoring = self._scoring
        best = min(entries, key=lambda entry: scoring.score(scoring.judged(entry.results, base), base), default=None)
        if best is None or scoring.stalled(best.results, base):
            return 0.0
        return refit_hours(best.results, best.trial.total_steps)
