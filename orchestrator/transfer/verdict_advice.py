"""Recommendations that follow a verdict, by what decided it."""

from __future__ import annotations

from typing import Literal

from orchestrator.transfer.headline import advice_on_answers, gain_is_loss_only
from orchestrator.transfer.records import ComparisonRecord, TransferReport, VerdictKind
from orchestrator.transfer.scoring import SMALLEST_GAIN

Decider = Literal["none", "scratch", "repeat"]
_LOOK_AT_ROWS = "look at the training rows: `orchestrator data SPEC`"
_MORE_EVAL = "give more or cleaner eval rows (data.eval): the promoted trial looked better on eval than on test"
_ADVICE: dict[tuple[VerdictKind, Decider], tuple[str, ...]] = {
    ("negative", "none"): (
        "do not serve this bundle, serve the base model: it is better on the test set",
        _LOOK_AT_ROWS,
        _MORE_EVAL,
    ),
    ("negative", "scratch"): (
        "do not serve this bundle: training from scratch is better on the test set, so another base may help; this one does not",
        _LOOK_AT_ROWS,
    ),
    ("no gain", "none"): ("the base model is as good: the test set excludes a gain that matters",),
    ("no gain", "scratch"): ("training from scratch is as good: another base may help; this one does not",),
    ("inconclusive", "none"): (
        "use more test rows (data.test, data.test_rows) to decide; until then the base model may be as good",
    ),
    ("inconclusive", "scratch"): (
        "use more test rows or seeds (data.test, data.test_rows, search.repeats) to distinguish it from training from scratch",
    ),
    ("inconclusive", "repeat"): ("use more seeds (search.repeats) to decide: another seed may give no gain",),
}


def advice_after(transfer: TransferReport, *, by_hand: bool = False) -> tuple[str, ...]:
    """Return what to do next, in order; empty without a verdict, or if it is `positive` and more answers are correct.

    Args:
        by_hand: True if a person promoted the trial: it may then never have looked good on eval.
    """
    if transfer.verdict is None:
        return ()
    if gain_is_loss_only(transfer):
        return advice_on_answers(transfer)
    advice = _ADVICE.get((transfer.verdict, decided_by(transfer)), ())
    return tuple(line for line in advice if line != _MORE_EVAL or not by_hand)


def decided_by(transfer: TransferReport) -> Decider:
    """Return the comparison that a verdict other than `positive` rests on: with the base, with training from scratch, or with
    trainings from other seeds. If both the base and `scratch` lead to the verdict, the base is named."""
    found = {each.against: each for each in transfer.comparisons}
    deciders: tuple[Decider, ...] = ("none", "scratch")
    for name in deciders:
        if name in found and _leads_to(found[name], transfer.verdict):
            return name
    return "repeat" if "none" in found else "none"


def _leads_to(comparison: ComparisonRecord, verdict: VerdictKind | None) -> bool:
    """Return True if one comparison alone leads to the verdict, or to a worse one."""
    bounds = {"negative": 0.0, "no gain": SMALLEST_GAIN}
    return comparison.low <= 0 and (verdict not in bounds or comparison.high < bounds[verdict])
