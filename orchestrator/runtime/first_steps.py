"""Estimate a sweep's remaining time from its first steps, and correct the estimate from later ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan.cost.choices import scored_flops
from orchestrator.plan.cost.duration import MeasuredSteps, MeasuredTimes, calibrated, calibration_message, measured_duration
from orchestrator.plan.cost.estimate import units_of_gang
from orchestrator.plan.estimates import CostEstimate, Duration
from orchestrator.plan.values import SweepPlan
from orchestrator.units import format_seconds
from orchestrator.work.results import RungResult

REPORT_FACTOR = 1.5
"""A later estimate is reported if it differs by this factor from the last reported one."""

logger = logging.getLogger(__name__)


class FirstSteps:
    """Collects rungs of searched trials. After the first one of each gang it estimates the time of the run at their rate, and
    again whenever later rungs change the estimate.

    Args:
        begun: Start of the run; by default now.
        clock: Unix time, as in the results.
    """

    def __init__(
        self,
        plan: SweepPlan,
        anatomy: ModelAnatomy,
        num_gangs: int,
        *,
        begun: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan, self._anatomy, self._clock = plan, anatomy, clock
        self._wanted = min(num_gangs, plan.search.num_trials)
        self.begun = clock() if begun is None else begun
        self._num_first = 0
        self._steady: list[MeasuredSteps] = []
        self._warming: list[MeasuredSteps] = []
        self._results: list[RungResult] = []
        self._reported: Duration | None = None

    def add(self, option: int | None, result: RungResult) -> dict[str, Any] | None:
        """Return the event to emit: `first_steps` once, when all awaited results are in, and then `estimate`.

        An estimate that fails does not fail a trial.

        Args:
            option: Index in the plan's options; None for a control, which does not count.
        """
        try:
            return self._estimate(option, result)
        except Exception:
            logger.exception("no estimate can be made from the first steps")
            return None

    def _estimate(self, option: int | None, result: RungResult) -> dict[str, Any] | None:
        if option is None or result.state != "done" or (result.rung > 0 and result.steady_tokens_per_s is None):
            return None
        self._results.append(result)
        self._num_first += result.rung == 0
        if result.steady_tokens_per_s:  # excludes the steps that warm a gang up
            seconds = result.train_seconds or 1.0
            self._steady.append(MeasuredSteps(option, round(result.steady_tokens_per_s * seconds), seconds))
        elif result.rung == 0:
            self._warming.append(MeasuredSteps(option, result.tokens, result.train_seconds))
        planned = self._plan.cost
        if self._num_first < self._wanted or planned is None:
            return None
        found = self._found()
        if found is None:
            return None
        duration = measured_duration(self._plan, found, self._times(found))
        return self._event(planned, found, duration)

    def _found(self) -> CostEstimate | None:
        """Estimate at the rate of steady steps; without any, at that of the trial that warmed up fastest."""
        if self._steady:
            return calibrated(self._plan, self._anatomy, self._steady)
        by_trial = [calibrated(self._plan, self._anatomy, [steps]) for steps in self._warming]
        estimates = [estimate for estimate in by_trial if estimate is not None]
        return max(estimates, key=lambda estimate: estimate.rate.achieved_share, default=None)

    def _times(self, found: CostEstimate) -> MeasuredTimes:
        now = self._clock()
        begun = min((result.started_at for result in self._results if result.started_at), default=now)
        per_rung = 0.0
        spans = [_span(result) for result in self._results if result.finished_at > result.started_at > 0]
        if spans and found.rate.flops:
            scored = scored_flops(self._plan, self._anatomy) / (found.rate.flops * units_of_gang(self._plan.execution))
            per_rung = max(0.0, sum(spans) / len(spans) - scored)
        return MeasuredTimes(elapsed_s=max(0.0, now - self.begun), computing_s=max(0.0, now - begun), rung_s=per_rung)

    def _event(self, planned: CostEstimate, found: CostEstimate, duration: Duration | None) -> dict[str, Any] | None:
        before, self._reported = self._reported, duration or self._reported
        if before is not None and duration is not None:
            ratio = duration.middle_s / before.middle_s if before.middle_s else 1.0
            # Compared with the last reported estimate and not the last one, or slow drift would never be reported.
            if 1 / REPORT_FACTOR < ratio < REPORT_FACTOR:
                self._reported = before
                return None
        elif self._num_first > self._wanted:
            return None
        steps = "the first steps" if before is None else "the steps so far"
        message, ends = calibration_message(planned, found, steps), dict[str, float]()
        if duration is not None:
            left = max(0.0, duration.middle_s - (self._clock() - self.begun))
            by_plan = f"; the plan said {planned.duration}" if planned.duration is not None else ""
            in_all = f"{format_seconds(duration.middle_s)} in all ({duration}{by_plan})"
            message = f"about {format_seconds(left)} left, {in_all}: {message}"
            ends = {
                "low_seconds": duration.low_s,
                "expected_seconds": duration.middle_s,
                "high_seconds": duration.high_s,
                "seconds_left": left,
                "expected_end": self._clock() + left,
            }
        return {
            "kind": "first_steps" if before is None else "estimate",
            "message": message,
            "achieved_share": found.rate.achieved_share,
            "gpu_hours": found.gpu_hours,
            "core_hours": found.core_hours,
            "wall_hours": found.wall_hours,
            **ends,
        }


def _span(result: RungResult) -> float:
    """Return the gang's seconds at a rung besides training; each trial of a shared batch counts its part."""
    sharing = result.engine.fused_trials if result.engine is not None else 1
    return max(0.0, (result.finished_at - result.started_at) / max(1, sharing) - result.train_seconds)
