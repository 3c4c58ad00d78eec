"""Scores of a trial: losses on its held-out sets, metrics, and the class prior of a classifier that is not trained yet."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from orchestrator.errors import NonFiniteLossError
from orchestrator.train import heartbeat
from orchestrator.train.context import HostContext
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.evaluation import Evaluation, answer_accuracy, class_prior, evaluate_trials, score_texts
from orchestrator.train.generate import PROMPTS_AT_ONCE, generate_answers, wanted_answers
from orchestrator.train.model.objective import Objective
from orchestrator.work.assignment import EvaluateBase, TrainRung
from orchestrator.work.execution import ExecutionPlan


@dataclass
class Scores:
    """A trial's numbers on held-out data; empty until it was evaluated."""

    evaluation: Evaluation | None = None
    retain: Evaluation | None = None
    retain_accuracy: float | None = None
    """On the answers of the retention set; None where it has none."""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def by_set(self) -> dict[str, Evaluation]:
        """Return the evaluations that were made, by the name of their set."""
        both = {"eval": self.evaluation, "retain": self.retain}
        return {name: evaluation for name, evaluation in both.items() if evaluation is not None}


@dataclass(frozen=True)
class Scorer:
    """Scores one piece of work. Every rank calls the same methods and gets the same answers."""

    context: HostContext
    work: TrainRung | EvaluateBase
    execution: ExecutionPlan

    def score(self, objective: Objective) -> Scores:
        """Evaluate on `eval` and, where there is one, on `retain`.

        Raises:
            NonFiniteLossError: a loss that is not finite; on every rank.
        """
        (scores,) = self.score_trials(objective, 1)
        if isinstance(scores, NonFiniteLossError):
            raise scores
        return scores

    def score_trials(self, objective: Objective, num_trials: int) -> list[Scores | NonFiniteLossError]:
        """Return, for each trial of the batch, its scores or why it has none."""
        started = time.perf_counter()
        data = self.work.data
        evaluations = self._evaluate(objective, data.eval, num_trials)
        retained: list[Evaluation | None] = [None] * num_trials
        if data.retain and self.context.base.load.traits.head.scores_retention:
            retained = list(self._evaluate(objective, data.retain, num_trials))
        both = list(zip(evaluations, retained, strict=True))
        failures = [_not_finite("eval", evaluation) or _not_finite("retain", retain) for evaluation, retain in both]
        metrics = [
            {} if failure else self._metrics(objective, evaluation)
            for failure, evaluation in zip(failures, evaluations, strict=True)
        ]
        seconds = (time.perf_counter() - started) / num_trials
        return [
            failure or Scores(evaluation, retain, self._retain_accuracy(retain), found, seconds)
            for failure, (evaluation, retain), found in zip(failures, both, metrics, strict=True)
        ]

    def score_prior(self, objective: Objective) -> Scores:
        """Score a classifier whose head is not trained yet: it predicts the class prior."""
        data, train = self.context.sets.load(self.work.data.eval), self.context.sets.load(self.work.data.train)
        evaluation = class_prior(data, train, self.context.base.load.num_classes)
        return Scores(evaluation, metrics=self._metrics(objective, evaluation))

    def _evaluate(self, objective: Objective, path: str, num_trials: int) -> list[Evaluation]:
        heartbeat.enter("evaluating")
        states = self.context.trunk.states(path, self.work.selection.cut) if self.work.trunk is not None else None
        return evaluate_trials(
            objective, self.context.sets.load(path), self.context.rows(self.execution), self.context.ranks, num_trials, states
        )

    def _retain_accuracy(self, retain: Evaluation | None) -> float | None:
        path = self.work.data.retain
        return answer_accuracy(retain, self.context.sets.load(path)) if retain is not None and path is not None else None

    def _metrics(self, objective: Objective, evaluation: Evaluation) -> dict[str, float]:
        data, metric = self.context.sets.load(self.work.data.eval), self.work.metric

        def generate() -> tuple[list[str], list[str]]:
            tokenizer = self.context.base.tokenizer
            heartbeat.enter("generating")
            # `generate` calls the model itself and not the objective, which would count the beats.
            counting = objective.model.register_forward_pre_hook(heartbeat.beat_before)
            try:
                made = generate_answers(
                    objective.model,
                    tokenizer,
                    data,
                    self.context.ranks,
                    rows=PROMPTS_AT_ONCE if self.context.base.anatomy.ways.pads else 1,
                    synced=is_partitioned(self.execution),
                )
            finally:
                counting.remove()
            heartbeat.enter("computing the metric")
            return made, wanted_answers(data, tokenizer)

        heartbeat.enter("computing the metric")
        value = score_texts(metric, evaluation, data, self.context.base.load.class_names, generate)
        return evaluation.metrics if value is None else evaluation.metrics | {metric: value}


def _not_finite(name: str, evaluation: Evaluation | None) -> NonFiniteLossError | None:
    if evaluation is None or math.isfinite(evaluation.loss):
        return None
    return NonFiniteLossError(
        f"the loss on {name} became {evaluation.loss}",
        expected="a finite number",
        remedy="lower the learning rate; if the base model's loss is not finite either, set train.dtype: float32",
    )
