"""From a rung's result to the one number that the search minimises."""

from __future__ import annotations

from orchestrator.plan.results import RungResult
from orchestrator.transfer import WORST_SCORE, forgetting, score
from orchestrator.values import Value


class Scoring(Value):
    """The search's metric and its bound on forgetting."""

    metric: str
    max_forgetting: float

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    def metric_of(self, result: RungResult) -> float | None:
        """The metric's value, or None where it was not measured."""
        return result.metrics.get(self.metric, result.eval_loss if self.metric == "loss" else None)

    def forgetting_of(self, result: RungResult, base: RungResult | None) -> float | None:
        """Rise of the retention loss over the untouched base's, nats per token."""
        if base is None or result.retain_loss is None or base.retain_loss is None:
            return None
        return forgetting(result.retain_loss, base.retain_loss)

    def score(self, result: RungResult, base: RungResult | None) -> float:
        """Lower is better; `WORST_SCORE` for a trial that failed or could not be measured."""
        value = self.metric_of(result)
        if result.state == "failed" or value is None:
            return WORST_SCORE
        lost = self.forgetting_of(result, base)
        return score(value, self.higher_is_better, lost, self.max_forgetting)
