"""What a sweep's first steps say about the rest of it."""

from __future__ import annotations

import logging
from typing import Any

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan.cost.calibration import MeasuredSteps, calibrated, calibration_sentence
from orchestrator.plan.results import RungResult
from orchestrator.plan.values import RunPlan

logger = logging.getLogger(__name__)


class FirstSteps:
    """Collects the first rung of one trial for each gang, and then says once what the run will take at their rate."""

    def __init__(self, plan: RunPlan, anatomy: ModelAnatomy, num_gangs: int) -> None:
        self._plan, self._anatomy = plan, anatomy
        self._wanted = min(num_gangs, plan.search.num_trials) if plan.search is not None else 1
        self._measured: list[MeasuredSteps] = []

    def hear(self, option: int | None, result: RungResult) -> dict[str, Any] | None:
        """The event to tell, after the last result that was waited for. An estimate that fails is no trial's failure.

        Args:
            option: Index in the plan's options; None for a control, which does not count.
        """
        try:
            return self._estimate(option, result)
        except Exception:
            logger.exception("what the first steps say about the rest is not known")
            return None

    def _estimate(self, option: int | None, result: RungResult) -> dict[str, Any] | None:
        if option is None or result.rung > 0 or result.state != "done" or len(self._measured) >= self._wanted:
            return None
        steady = result.steady_tokens_per_s  # without the steps that warm a gang up, where the rung had more
        tokens, seconds = (round(steady), 1.0) if steady else (result.tokens, result.train_seconds)
        self._measured.append(MeasuredSteps(option, tokens, seconds))
        planned = self._plan.cost
        if len(self._measured) < self._wanted or planned is None:
            return None
        found = calibrated(self._plan, self._anatomy, self._measured)
        if found is None:
            return None
        return {
            "message": calibration_sentence(planned, found),
            "achieved_share": found.rate.achieved_share,
            "gpu_hours": found.gpu_hours,
            "core_hours": found.core_hours,
            "wall_hours": found.wall_hours,
        }
