"""The verdict in the form that users read first: final screen, top of the report, model card."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec.tasks import metric_facts
from orchestrator.transfer.records import ModelScores, TransferReport

LOSS_ONLY = "positive in loss only"
"""Label of a `positive` verdict if the bundle gives no more correct answers than the base."""


@dataclass(frozen=True)
class RightAnswers:
    """Share of correct answers (for classification: of correct classes) of bundle and base."""

    metric: str
    """`exact_match` or `accuracy`."""
    own: float
    base: float | None
    num_answered: int
    num_documents: int

    @property
    def no_more(self) -> bool:
        """True if the bundle gives no correct answer, or no more of them than the base."""
        return self.own <= 0 or (self.base is not None and self.own <= self.base)

    def __str__(self) -> str:
        """`exact match 41.2% on 200 of 500 test documents, base 0.0%`."""
        base = f", base {100 * self.base:.1f}%" if self.base is not None else ""
        title = metric_facts(self.metric).title
        return f"{title} {100 * self.own:.1f}% on {self.num_answered} of {self.num_documents} test documents{base}"


def right_answers(transfer: TransferReport) -> RightAnswers | None:
    """Return the correct answers on the test set; None if the task neither generates answers nor predicts classes."""
    scores = {score.model: score for score in transfer.scores}
    promoted, base = scores.get("promoted"), scores.get("none")
    if promoted is None:
        return None
    if promoted.num_answered and "exact_match" in promoted.metrics:
        return _counted("exact_match", promoted, base, promoted.num_answered)
    if "accuracy" in promoted.metrics:
        return _counted("accuracy", promoted, base, promoted.num_documents)
    return None


def _counted(metric: str, promoted: ModelScores, base: ModelScores | None, num_answered: int) -> RightAnswers:
    of_base = base.metrics.get(metric) if base is not None else None
    return RightAnswers(metric, promoted.metrics[metric], of_base, num_answered, promoted.num_documents)


def gain_is_loss_only(transfer: TransferReport) -> bool:
    """Return True if a `positive` verdict rests on the loss only: no more answers are correct than the base's."""
    found = right_answers(transfer)
    return transfer.verdict == "positive" and found is not None and found.no_more


def headline(transfer: TransferReport) -> str:
    """Return the verdict's line: `positive: 2.09 ± 0.05 nats better than the base, on 180 test examples; exact match 41.2% on
    180 of 180 test documents, base 0.0%`. Empty if there is no verdict."""
    if not transfer.sentence or transfer.verdict is None:
        return transfer.sentence
    found = right_answers(transfer)
    if found is None:
        return f"{transfer.verdict}: {transfer.sentence}"
    if not gain_is_loss_only(transfer):
        return f"{transfer.verdict}: {transfer.sentence}; {found}"
    what = "class" if found.metric == "accuracy" else "answer"
    several = "classes" if found.metric == "accuracy" else "answers"
    said = f"but not one {what} is correct" if found.own <= 0 else f"but no more {several} are correct than the base's"
    return f"{LOSS_ONLY}: {transfer.sentence}; {said}: {found}"


def advice_on_answers(transfer: TransferReport) -> tuple[str, ...]:
    """Return what to try if the loss improved and the answers did not; empty if both improved."""
    found = right_answers(transfer)
    if not gain_is_loss_only(transfer) or found is None:
        return ()
    if found.metric == "accuracy":
        return (
            "no more classes are correct than the base's: raise train.epochs or give more rows of each class, and compare "
            "trials by accuracy (search.metric: accuracy)",
        )
    return (
        "compare the answers with the expected ones in the report: a lower loss does not make an answer correct. If several "
        "wordings are correct, exact match does not count all of them",
        "if they are wrong: raise train.epochs, give more rows, train more layers (all), and check which tokens are supervised: "
        "`orchestrator data SPEC`",
    )
