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

TOLD_AGAIN = 1.5
"""A later estimate is told where it differs by this factor from the one that was told last."""

logger = logging.getLogger(__name__)


class FirstSteps:
    """Collects rungs of searched trials. After the first one of each gang it says what the run will take at their rate; then
    again whenever more of them say something else.

    Args:
        begun: When the run began; now unless given.
        clock: Unix time, as the results have it.
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
        self._told: Duration | None = None

    def hear(self, option: int | None, result: RungResult) -> dict[str, Any] | None:
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
        if result.steady_tokens_per_s:  # without the steps that warm a gang up, where the rung had more
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
        """At the rate of steady steps; where there were none, at that of the trial that warmed up fastest."""
        if self._steady:
            return calibrated(self._plan, self._anatomy, self._steady)
        each = [calibrated(self._plan, self._anatomy, [steps]) for steps in self._warming]
        return max((one for one in each if one is not None), key=lambda one: one.rate.achieved_share, default=None)

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
        before, self._told = self._told, duration or self._told
        if before is not None and duration is not None:
            ratio = duration.middle_s / before.middle_s if before.middle_s else 1.0
            if 1 / TOLD_AGAIN < ratio < TOLD_AGAIN:
                self._told = before
                return None
        elif self._num_first > self._wanted:
            return None
        message, ends = calibration_message(planned, found), dict[str, float]()
        if before is not None:
            message = message.replace("the first steps reach", "the steps so far reach", 1)
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
    """Seconds of its gang at a rung, beside training: of trials that share batches, each one's part."""
    sharing = result.engine.fused_trials if result.engine is not None else 1
    return max(0.0, (result.finished_at - result.started_at) / max(1, sharing) - result.train_seconds)
