"""What is said first: never proud of a model that answers nothing."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.transfer.headline import gain_is_loss_only, headline, right_answers
from orchestrator.transfer.records import ModelScores, TransferReport
from orchestrator.transfer.verdict_advice import advice_after

SENTENCE = "2.09 ± 0.05 nats better than the base, on 180 test examples"


def report(verdict: Any = "positive", sentence: str = SENTENCE, answered: int = 180, **metrics: Any) -> TransferReport:
    """`exact_match=(own, base)` or `accuracy=(own, base)`."""
    scores = [
        ModelScores(
            model=model,
            metrics={"loss": 1.0, **{name: pair[index] for name, pair in metrics.items() if pair[index] is not None}},
            num_documents=180,
            num_answered=answered if "exact_match" in metrics else 0,
        )
        for index, model in enumerate(("promoted", "none"))
    ]
    return TransferReport(verdict=verdict, sentence=sentence, scores=tuple(scores))


@pytest.mark.parametrize(
    ("transfer", "said", "loss_only"),
    [
        (
            report(exact_match=(0.412, 0.0)),
            f"positive: {SENTENCE}; exact match 41.2% on 180 of 180 test documents, base 0.0%",
            False,
        ),
        (
            report(exact_match=(0.0, 0.0), answered=40),
            f"positive in loss only: {SENTENCE}; but not one answer is correct: exact match 0.0% on 40 of 180 test "
            "documents, base 0.0%",
            True,
        ),
        (
            report(exact_match=(0.04, 0.05)),
            f"positive in loss only: {SENTENCE}; but no more answers are correct than the base's: exact match 4.0% on 180 of 180 "
            "test documents, base 5.0%",
            True,
        ),
        (
            report(accuracy=(0.25, 0.25)),
            f"positive in loss only: {SENTENCE}; but no more classes are correct than the base's: accuracy 25.0% on 180 of "
            "180 test documents, base 25.0%",
            True,
        ),
        (report(accuracy=(0.8, 0.25)), f"positive: {SENTENCE}; accuracy 80.0% on 180 of 180 test documents, base 25.0%", False),
        (report(), f"positive: {SENTENCE}", False),
        (
            report("inconclusive", exact_match=(0.0, 0.0)),
            f"inconclusive: {SENTENCE}; exact match 0.0% on 180 of 180 test documents, base 0.0%",
            False,
        ),
        (
            report("negative", "worse", exact_match=(0.1, None)),
            "negative: worse; exact match 10.0% on 180 of 180 test documents",
            False,
        ),
        (report(exact_match=(0.5, 0.0), answered=0), f"positive: {SENTENCE}", False),
        (TransferReport(sentence="nothing was promoted"), "nothing was promoted", False),
        (TransferReport(), "", False),
    ],
    ids=[
        "right",
        "none right",
        "no more right",
        "class prior",
        "classes",
        "no metric",
        "open",
        "no base",
        "unanswered",
        "none",
        "empty",
    ],
)
def test_the_headline(transfer: TransferReport, said: str, loss_only: bool) -> None:
    assert headline(transfer) == said
    assert gain_is_loss_only(transfer) is loss_only


def test_a_gain_in_loss_only_comes_with_what_it_means_and_what_to_try() -> None:
    read, train = advice_after(report(exact_match=(0.0, 0.0)))
    assert read.startswith("compare the answers with the expected ones")
    assert "train.epochs" in train
    (classes,) = advice_after(report(accuracy=(0.25, 0.25)))
    assert "search.metric: accuracy" in classes
    assert advice_after(report(exact_match=(0.5, 0.0))) == ()


def test_without_scores_nothing_is_counted() -> None:
    assert right_answers(TransferReport(verdict="positive", sentence=SENTENCE)) is None
