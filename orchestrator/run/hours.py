"""GPU-hours: what a run has used over all its submissions, and whether its search may still give out work.

A rank's hour is an hour in which the run holds the rank's place, whatever it does there: on a GPU a GPU-hour. On a
cluster without GPUs a rank's hour counts as one too, so that `resources.max_gpu_hours` holds there as well.
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
"""What a killed driver forgets at most."""
MOST_FOR_THE_REFIT = 0.5
"""Share of the bound: a refit that would take more gets no reserve, and the promoted trial's own last rung is bundled."""


logger = logging.getLogger(__name__)


class HoursState(Value):
    """What the exchange says when the search is over."""

    used: float
    spent: str = ""
    """Why no more work was given out; empty where the bound was not reached."""


class HoursRecord(Value):
    """hours.json."""

    used: NonNegativeFloat = Field(allow_inf_nan=False)


class Meter:
    """Counts the hours of the places that are held, on top of what earlier submissions used.

    One process at a time counts for a run: the exchange during the search, the driver after it.

    Args:
        file: Where the figure outlives the process, at most SAVE_EVERY_S old while the meter is open.
        clock: Seconds that only go forward.
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
        """Ranks have been given their places."""
        self._held[what] = (num_ranks, self._clock())

    def release(self, what: object) -> None:
        """They have given them back; nothing happens where none was held."""
        num_ranks, since = self._held.get(what, (0, 0.0))
        self._seconds += num_ranks * (self._clock() - since)  # first: a save between the two counts too much, never too little
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
            except OSError as error:  # a full disk, say: the next one may succeed, and `close` raises where it does not
                logger.warning("the GPU-hours were not written to disk: %s", error)

    def _save(self) -> None:
        write_json(self._file, HoursRecord(used=self.used_hours))


@contextmanager
def metered(file: Path, num_ranks: int) -> Iterator[None]:
    """The driver holds so many ranks while the block runs."""
    meter = Meter(file)
    meter.open()
    meter.hold("driver", num_ranks)
    try:
        yield
    finally:
        meter.release("driver")
        meter.close()


def read_hours(file: Path) -> float:
    """Hours that a run has used, by its file."""
    return read_record(file, HoursRecord).used if file.exists() else 0.0


def refit_hours(results: Sequence[RungResult], total_steps: int) -> float:
    """What the refit of a trial will take, at the speed that the trial has shown; 0 where it had the full budget.

    Measured rather than planned: by now the run knows what the plan had to guess.
    """
    done = [result for result in results if result.state == "done"]
    if not done or not 0 < done[-1].step < total_steps:
        return 0.0
    seconds_per_step = sum(result.train_seconds for result in done) / done[-1].step
    return _ranks(done[-1]) * seconds_per_step * total_steps / 3600


def affords_refit(expected_hours: float, max_hours: float | None) -> bool:
    return max_hours is None or expected_hours <= MOST_FOR_THE_REFIT * max_hours


def is_left_for_refit(expected_hours: float, used_hours: float, max_hours: float | None, slack_hours: float) -> bool:
    """Whether what is left of the bound is enough for what is left of the refit.

    Args:
        slack_hours: What the rungs took at most that were under way when the search kept the rest for the refit.
    """
    return max_hours is None or used_hours + expected_hours <= max_hours + slack_hours


def rung_hours(results: Sequence[RungResult]) -> float:
    """Rank-hours of the longest rung of a trial, its evaluation included."""
    return max((_ranks(result) * (result.train_seconds + result.eval_seconds) for result in results), default=0.0) / 3600


def is_spent(used_hours: float, max_hours: float | None, expected_refit_hours: float = 0.0) -> bool:
    """Whether no more work may be given out: what is left goes to the refit of the best trial so far."""
    if max_hours is None:
        return False
    reserve = expected_refit_hours if affords_refit(expected_refit_hours, max_hours) else 0.0
    return used_hours + reserve >= max_hours


def may_go_on(earlier_max_hours: float | None, used_hours: float, max_hours: float | None) -> bool:
    """Whether a search that was ended by its bound may be taken up again: the bound was raised, and beyond what is used."""
    return max_hours is None or max_hours > max(earlier_max_hours or 0.0, used_hours)


def _ranks(result: RungResult) -> int:
    return result.engine.ranks if result.engine is not None else 1


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
