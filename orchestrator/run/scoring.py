"""The score of a rung's result: the one number that the search minimises."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.plan.values import RunPlan, SweepPlan
from orchestrator.spec.models import SearchSpec
from orchestrator.spec.tasks import higher_is_better
from orchestrator.transfer import WORST_SCORE, forgetting, score
from orchestrator.transfer.records import BundledFigures
from orchestrator.values import Value
from orchestrator.work.results import RungResult


class Scoring(Value):
    """The search's metric and its bound on forgetting; see `scoring_of`."""

    metric: str
    max_forgetting: float
    patience: int | None = None
    """See `SearchPlan.patience`; None without early stopping."""

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.metric)

    def metric_of(self, result: RungResult) -> float | None:
        """Return the metric's value, or None where it was not measured."""
        return result.metrics.get(self.metric, result.eval_loss if self.metric == "loss" else None)

    def forgetting_of(self, result: RungResult, base: RungResult | None) -> float | None:
        """Return the increase of the retention loss over the base model's, in nats per token."""
        if base is None or result.retain_loss is None or base.retain_loss is None:
            return None
        return forgetting(result.retain_loss, base.retain_loss)

    def figures_of(self, result: RungResult, base: RungResult | None) -> BundledFigures:
        """Return the measured figures of the rung or refit that is bundled."""
        return BundledFigures(
            step=result.step,
            metric=self.metric_of(result),
            retain_loss=result.retain_loss,
            forgetting=self.forgetting_of(result, base),
        )

    def judged(self, results: Sequence[RungResult], base: RungResult | None) -> RungResult:
        """Return the rung that a trial is compared by: the last, or with early stopping the best so far."""
        done = [result for result in results if result.state == "done"]
        if self.patience is None or not done:
            return results[-1]
        return min(done, key=lambda result: self.score(result, base))

    def stalled(self, results: Sequence[RungResult], base: RungResult | None) -> str:
        """Return why a trial stops early: in its last `patience` rungs neither its loss on the eval set nor its score improved
        (Prechelt 1998, "Early stopping - but when?"). Empty where one has."""
        if self.patience is None or len(results) <= self.patience or results[-1].state == "failed":
            return ""
        scores = [self.score(result, base) for result in results]
        losses = [loss if (loss := result.eval_loss) is not None and math.isfinite(loss) else math.inf for result in results]
        # The later of the two best rungs: an improvement of either figure lets the trial continue.
        best = max(scores.index(min(scores)), losses.index(min(losses)))
        if best >= len(results) - self.patience:
            return ""
        what = "its held-out loss has not" if self.metric == "loss" else f"neither its held-out loss nor its {self.metric} has"
        return f"{what} improved since step {results[best].step}"

    def needs_refit(self, results: Sequence[RungResult], total_steps: int, base: RungResult | None) -> bool:
        """Return whether a trial with these results is trained again before it is bundled: it had less than its full budget, and
        was not stopped because more training no longer improved it."""
        return results[-1].step < total_steps and not self.stalled(results, base)

    def score(self, result: RungResult, base: RungResult | None) -> float:
        """Return the score, lower is better; `WORST_SCORE` for a trial that failed or could not be measured."""
        value = self.metric_of(result)
        if result.state == "failed" or value is None:
            return WORST_SCORE
        lost = self.forgetting_of(result, base)
        return score(value, self.higher_is_better, lost, self.max_forgetting)


def scoring_of(search: SearchSpec | None, plan: RunPlan | None) -> Scoring:
    """Return how a run's trials are scored. The one-trial job compares nothing: its metric is the loss, without a bound.

    Args:
        plan: None where it cannot be read; then trials are judged by their last rung.
    """
    if search is None or (plan is not None and not isinstance(plan, SweepPlan)):
        return Scoring(metric="loss", max_forgetting=math.inf)
    patience = plan.search.patience if isinstance(plan, SweepPlan) else None
    return Scoring(metric=search.metric, max_forgetting=search.max_forgetting, patience=patience)
