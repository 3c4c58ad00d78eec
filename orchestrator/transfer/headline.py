"""The verdict as people read it first: on the last screen, on top of the report, in the model card."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.transfer.records import ModelScores, TransferReport

LOSS_ONLY = "positive in loss only"
"""What a `positive` verdict is called where the bundle gives no more right answers than the base."""
_PLAINLY = {"exact_match": "exact match", "accuracy": "accuracy"}


@dataclass(frozen=True)
class RightAnswers:
    """How many answers are right, of bundle and base; classes that are right, to classify."""

    metric: str
    """`exact_match` or `accuracy`."""
    own: float
    base: float | None
    num_answered: int
    num_documents: int

    @property
    def no_more(self) -> bool:
        """Whether the bundle gives no right answer, or no more of them than the base."""
        return self.own <= 0 or (self.base is not None and self.own <= self.base)

    def __str__(self) -> str:
        """`exact match 41.2% on 200 of 500 test documents, base 0.0%`."""
        base = f", base {100 * self.base:.1f}%" if self.base is not None else ""
        return (
            f"{_PLAINLY[self.metric]} {100 * self.own:.1f}% on {self.num_answered} of {self.num_documents} test documents{base}"
        )


def right_answers(transfer: TransferReport) -> RightAnswers | None:
    """Of the test set, where answers were generated or classes predicted; None where the task has neither."""
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
    """Whether a verdict `positive` rests on the loss only: the answers are no more often right than the base's."""
    found = right_answers(transfer)
    return transfer.verdict == "positive" and found is not None and found.no_more


def headline(transfer: TransferReport) -> str:
    """`positive: 2.09 ± 0.05 nats better than the base, on 180 test examples; exact match 41.2% on 180 of 180 test documents,
    base 0.0%`; nothing where no verdict was reached and nothing is said instead."""
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
    """What a gain in loss without a gain in right answers means, and what to try; nothing where there is a gain in both."""
    found = right_answers(transfer)
    if not gain_is_loss_only(transfer) or found is None:
        return ()
    if found.metric == "accuracy":
        return (
            "the classes are no more often right than the base's: raise train.epochs or give more rows of each class, and "
            "compare trials by what you want: search.metric: accuracy",
        )
    return (
        "read the answers beside what was expected, in the report: likelier words are no right answers. Where several "
        "wordings are right, exact match cannot tell, and reading can",
        "if they are wrong: raise train.epochs, give more rows, train more layers (all), and look at what is supervised: "
        "`orchestrator data SPEC`",
    )
