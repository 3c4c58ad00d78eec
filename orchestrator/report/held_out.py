"""Test set sections: gains over the controls, scores, and held-out prompts before and after."""

from __future__ import annotations

import math

from orchestrator.report import gain_chart, html
from orchestrator.report.html import Html
from orchestrator.report.wording import (
    MISSING,
    metric_text,
    model_name,
    number,
    score_text,
    signed,
)
from orchestrator.transfer import OverSeeds
from orchestrator.transfer.records import CONTROL_NAMES, TransferReport

LONG_TEXT = 600
METHOD = {"bootstrap": "bootstrap", "sign_flip": "sign-flip test"}


def gains(transfer: TransferReport) -> Html:
    """Return the gains over the controls on the test set."""
    parts: list[object] = []
    shown = [c for c in transfer.comparisons if math.isfinite(c.mean) and math.isfinite(c.low) and math.isfinite(c.high)]
    rows = [
        [
            f"over {CONTROL_NAMES[c.against]}",
            *map(signed, (c.mean, c.low, c.high)),
            c.unit,
            METHOD[c.method] + (", over seeds" if c.over_seeds else ""),
            c.num_examples,
            number(c.p_value),
        ]
        for c in transfer.comparisons
    ]
    headers = ["gain", "mean", "low", "high", "unit", "method", "examples", "p"]
    data = html.table(headers, rows, numeric=(1, 2, 3, 6, 7))
    if shown:
        caption = (
            f"Paired per-example differences on the test set, which {_reads(transfer)}, with the bundle. Bars are 95% intervals. "
            "The gain over the base model includes style (form and length of the answers); the gain over shuffled answers, where "
            "that control ran, is the task alone."
        )
        parts.append(html.picture(gain_chart.gains(shown), caption, data))
    elif rows:
        parts.append(data)
    else:
        parts.append(html.tag("p", "Not tested: the test set is read only for a bundle."))
    if transfer.controls_left_out:
        parts.append(
            html.tag("div", html.tag("strong", "Not compared:"), html.bullets(transfer.controls_left_out), css="warning")
        )
    if transfer.gain_over_seeds is not None:
        parts.append(_by_seed(transfer.gain_over_seeds))
    parts.append(_scores(transfer))
    return html.join(parts)


def _by_seed(found: OverSeeds) -> Html:
    """Return the gain over the base for every seed of the promoted trial."""
    said = (
        f"The promoted trial was trained from {len(found.seeds)} seeds. Their mean gain over the base is {signed(found.mean)} "
        f"{found.unit} (95%: {signed(found.low)} to {signed(found.high)}, Student's t over seeds); the bundle's own comes first. "
        "Intervals over other trained models are widened to the difference between two seeds."
    )
    rows = [[seed, signed(value)] for seed, value in zip(found.seeds, found.values, strict=True)]
    return html.join([html.paragraph(said), html.table(["seed", f"gain, {found.unit}"], rows, numeric=(0, 1))])


def _reads(transfer: TransferReport) -> str:
    return "was read once" if transfer.test_set_reads < 2 else f"has been read {transfer.test_set_reads} times for this run"


def _scores(transfer: TransferReport) -> Html:
    if not transfer.scores:
        return Html()
    names = list(dict.fromkeys(name for score in transfer.scores for name in score.metrics))
    answered = any(score.retain_accuracy is not None for score in transfer.scores)
    rows = [
        [
            model_name(score.model),
            *(score_text(score, name) for name in names),
            number(score.retain_loss),
            *([metric_text(score.retain_accuracy, "accuracy")] if answered else []),
            signed(score.forgetting),
        ]
        for score in transfer.scores
    ]
    headers = ["model", *names, "retention loss", *(["retention accuracy"] if answered else []), "forgetting"]
    return html.table(headers, rows, numeric=range(1, len(headers)))


def prompts(transfer: TransferReport) -> Html:
    """Return held-out prompts with the answers of base and bundle."""
    shown = [
        html.tag(
            "div",
            html.tag("h3", "prompt"),
            html.tag("pre", _shorten(pair.prompt)),
            html.tag(
                "div",
                html.tag("div", html.tag("h3", "base model"), html.tag("pre", _shorten(pair.base_answer) or MISSING)),
                html.tag("div", html.tag("h3", "tuned"), html.tag("pre", _shorten(pair.tuned_answer) or MISSING)),
                css="answers",
            ),
            *((html.tag("h3", "expected"), html.tag("pre", _shorten(pair.expected))) if pair.expected else ()),
            css="prompt",
        )
        for pair in transfer.prompts
    ]
    return html.join(shown or [html.paragraph("No prompt was answered.")])


def _shorten(written: str) -> str:
    left_out = len(written) - LONG_TEXT
    return written if left_out <= 0 else f"{written[:LONG_TEXT]}… ({left_out} more characters)"
