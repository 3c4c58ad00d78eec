"""How fast steps are once the first, slow ones are over."""

from __future__ import annotations

from orchestrator.plan.results import StepReport

WARM_UP_STEPS = 2
"""Kernels are chosen, caches filled and buffers allocated in the first steps of an engine."""


class SteadySpeed:
    """Training tokens a second of an assignment's steps, without its first ones.

    Args:
        tokens: Training tokens that the trial had seen before.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._num_steps = 0
        self._steady_tokens = 0
        self._steady_seconds = 0.0

    def add(self, report: StepReport) -> None:
        tokens, self._tokens = report.tokens - self._tokens, report.tokens
        self._num_steps += 1
        if self._num_steps > WARM_UP_STEPS and report.tokens_per_s > 0:
            self._steady_tokens += tokens
            self._steady_seconds += tokens / report.tokens_per_s

    @property
    def tokens_per_s(self) -> float | None:
        """Over all ranks; None where there were no more steps than those to warm up."""
        return self._steady_tokens / self._steady_seconds if self._steady_seconds else None
