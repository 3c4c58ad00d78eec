"""Scores on held-out data: per-document losses first, everything else from them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data import TokenizedSet
from orchestrator.errors import TrainingError, UsageError
from orchestrator.plan.fusing import TEACHER_FORCED
from orchestrator.train import heartbeat
from orchestrator.train.batches import RowPlan, repeated, to_tensors
from orchestrator.train.model.objective import Objective
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.states import TrunkStates


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on one set of D documents."""

    loss: float
    """Nats per supervised token (to classify: per document)."""
    loss_sums: np.ndarray
    """float64[D]: each document's summed loss."""
    num_tokens: np.ndarray
    """int64[D]: each document's supervised tokens (to classify: 1)."""
    metrics: dict[str, float] = field(default_factory=dict)
    predictions: np.ndarray | None = None
    """int64[D]: each document's likeliest class; None unless classified."""
    num_missed: np.ndarray | None = None
    """int64[D]: supervised tokens of each document of which another one was likelier; None where not counted."""

    def save(self, file: Path) -> None:
        """Write the per-document numbers as .npz, for paired statistics."""
        arrays: dict[str, Any] = {"loss_sums": self.loss_sums, "num_tokens": self.num_tokens}
        if self.predictions is not None:
            arrays["predictions"] = self.predictions
        with file.open("wb") as stream:
            np.savez(stream, **arrays)

    @classmethod
    def load(cls, file: Path) -> Evaluation:
        with np.load(file, allow_pickle=False) as arrays:
            sums, tokens = arrays["loss_sums"], arrays["num_tokens"]
            predictions = arrays.get("predictions")
        return cls(float(sums.sum() / tokens.sum()), sums, tokens, predictions=predictions)


def evaluate(
    objective: Objective, data: TokenizedSet, rows: RowPlan, ranks: Ranks, trunk: TrunkStates | None = None
) -> Evaluation:
    """Token-weighted loss of every document of `data`, and what follows from it.

    The documents are dealt over the ranks in file order and every document's sum is made by one rank, so the totals
    do not depend on the number of ranks. Called on every rank; every rank gets the same answer. With a `trunk`, the
    objective begins from its hidden states.

    Raises:
        TrainingError: a set without a supervised token.
    """
    return evaluate_trials(objective, data, rows, ranks, 1, trunk)[0]


@torch.no_grad()
def evaluate_trials(
    objective: Objective,
    data: TokenizedSet,
    rows: RowPlan,
    ranks: Ranks,
    num_trials: int,
    trunk: TrunkStates | None = None,
) -> list[Evaluation]:
    """Evaluate each of the trials that share the model's batches; see `evaluate`."""
    count = num_trials * len(data)
    sums = np.zeros(count, dtype=np.float64)
    tokens = np.zeros(count, dtype=np.int64)
    predictions = np.zeros(count, dtype=np.int64)
    missed = np.zeros(count, dtype=np.int64)
    was_training = objective.training
    objective.eval()
    try:
        for batch in rows.batches(data, np.arange(len(data))):
            tensors = repeated(to_tensors(batch, ranks.device, trunk), num_trials)
            # Each trial's copy of a document gets a number of its own, so that one addition serves all trials.
            first = torch.arange(num_trials, device=ranks.device).repeat_interleave(len(batch.lengths)) * len(data)
            tensors["document_ids"] = tensors["document_ids"] + first[:, None]
            scored = objective(**tensors, each=True)
            owners = scored.document_ids.cpu().numpy()
            # Unbuffered: a document has many tokens, and `sums[owners] += ...` would keep only the last of them.
            np.add.at(sums, owners, scored.losses.double().cpu().numpy())
            np.add.at(tokens, owners, 1)
            predictions[owners] = scored.predictions.cpu().numpy()
            np.add.at(missed, owners, (scored.predictions != scored.targets).cpu().numpy())
    finally:
        objective.train(was_training)
    # Not a steady phase: the others may have longer documents, and waiting for them is no hang.
    heartbeat.enter("waiting for the other ranks")
    parts = ranks.gather((sums, tokens, predictions, missed))
    whole = [np.sum([part[i] for part in parts], axis=0).reshape(num_trials, len(data)) for i in range(4)]
    return [_summarise(data, *(array[trial] for array in whole)) for trial in range(num_trials)]


def answer_accuracy(evaluation: Evaluation, data: TokenizedSet) -> float | None:
    """Share of the documents with an answer whose answer, to its end token, is what greedy decoding would give; None without any.

    Read off the scores: greedy decoding gives the answer exactly where each of its tokens is the likeliest after those before.
    """
    asked = np.asarray([bool(answer) for answer in data.answers], bool)
    if evaluation.num_missed is None or not asked.any():
        return None
    return float((evaluation.num_missed[asked] == 0).mean())


def class_prior(data: TokenizedSet, train: TokenizedSet, num_classes: int) -> Evaluation:
    """Score a guess by the class frequencies of `train` on `data`: the floor of a classifier.

    Frequencies are smoothed by one count a class (Laplace), so that an unseen class has a finite loss.
    """
    counts = np.bincount(train.labels[train.labels >= 0], minlength=num_classes).astype(np.float64) + 1.0
    losses = -np.log(counts / counts.sum())[data.labels]
    predictions = np.full(len(data), int(counts.argmax()), dtype=np.int64)
    metrics = _class_metrics(predictions, data.labels)
    loss = float(losses.mean())
    return Evaluation(loss, losses, np.ones(len(data), dtype=np.int64), {"loss": loss} | metrics, predictions)


def text_metric(metric: str) -> Callable[[Sequence[str], Sequence[str]], float] | None:
    """Return the function that scores generated texts against answers; None if `metric` needs no generation.

    `package.module:function` names a function of (predictions, answers) -> float, higher is better.

    Raises:
        UsageError: no such module or function.
    """
    if metric in TEACHER_FORCED:
        return None
    if metric == "exact_match":
        return exact_match
    module_name, _, function_name = metric.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"metric {metric!r} cannot be imported: {error}", expected="package.module:function of (predictions, answers)"
        ) from error
    return function


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of predictions that are the answer, white space around both left out."""
    return sum(p.strip() == a.strip() for p, a in zip(predictions, answers, strict=True)) / max(1, len(answers))


def score_texts(
    metric: str,
    evaluation: Evaluation,
    data: TokenizedSet,
    class_names: Sequence[str],
    generate: Callable[[], tuple[Sequence[str], Sequence[str]]],
) -> float | None:
    """Compute the metric that compares texts; None if `metric` follows from the losses.

    A classifier's texts are the names of its classes; any other model's come from `generate`, which every rank
    calls, as (generated, wanted).
    """
    function = text_metric(metric)
    if function is None:
        return None
    if evaluation.predictions is not None:
        names = list(class_names) or [str(label) for label in range(int(data.labels.max()) + 1)]
        return float(function([names[p] for p in evaluation.predictions], [names[label] for label in data.labels]))
    return float(function(*generate()))


def _summarise(
    data: TokenizedSet, sums: np.ndarray, tokens: np.ndarray, predictions: np.ndarray, missed: np.ndarray
) -> Evaluation:
    """Summarise per-document float64 sums, added in document order: the result does not depend on how ranks shared them."""
    if not tokens.sum():
        raise TrainingError("the evaluation set has no supervised token", expected="at least one")
    loss = float(sums.sum() / tokens.sum())
    if (data.labels >= 0).any():
        return Evaluation(loss, sums, tokens, {"loss": loss} | _class_metrics(predictions, data.labels), predictions)
    # exp(710) overflows a float64.
    metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    return Evaluation(loss, sums, tokens, metrics, num_missed=missed)


def _class_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and the unweighted mean of the F1 of every class that occurs in the labels."""
    scores = []
    for label in np.unique(labels):
        hits = float(((predictions == label) & (labels == label)).sum())
        scores.append(2 * hits / float((predictions == label).sum() + (labels == label).sum()))
    return {"accuracy": float((predictions == labels).mean()), "macro_f1": float(np.mean(scores))}
