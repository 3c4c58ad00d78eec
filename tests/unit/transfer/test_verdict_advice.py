"""What decided a verdict, and what is advised after it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.transfer import Comparison, OverSeeds, over_seeds, verdict
from orchestrator.transfer.records import Control, TransferReport, VerdictKind
from orchestrator.transfer.verdict_advice import Decider, advice_after, decided_by

Interval = tuple[float, float]


def judged(none: Interval, scratch: Interval | None = None, seeds: tuple[float, ...] = ()) -> TransferReport:
    """A report with its verdict spoken by the rule, from the intervals of its comparisons and the gains by seed."""
    compared: dict[Control, Comparison] = {
        name: Comparison(mean=sum(ends) / 2, low=ends[0], high=ends[1], method="sign_flip", num_examples=180)
        for name, ends in (("none", none), ("scratch", scratch))
        if ends is not None
    }
    by_seed: OverSeeds | None = over_seeds(range(len(seeds)), seeds)
    found = verdict(compared["none"], compared.get("scratch"), over_seeds=by_seed)
    records = tuple(comparison.record(name) for name, comparison in compared.items())
    return TransferReport(verdict=found.kind, comparisons=records, gain_over_seeds=by_seed)


INFINITE = (-math.inf, math.inf)
A_SEED_FAILED = {"verdict": "inconclusive"}
"""What it makes of a clear gain; the seeds that are left may be too few for figures of their own."""


@pytest.mark.parametrize(
    ("transfer", "kind", "decider", "first"),
    [
        (judged((-0.3, -0.1)), "negative", "none", "do not serve this bundle, serve the base model"),
        (judged((-0.3, -0.1), (-0.4, -0.2)), "negative", "none", "do not serve this bundle, serve the base model"),
        (judged((0.1, 0.3), (-0.4, -0.2)), "negative", "scratch", "do not serve this bundle: training from scratch"),
        (judged((-0.1, 0.3), (-0.4, -0.2)), "negative", "scratch", "do not serve this bundle: training from scratch"),
        (judged((-0.3, -0.1), (-0.001, 0.001)), "negative", "none", "do not serve this bundle, serve the base model"),
        (judged((-0.004, 0.006)), "no gain", "none", "the base model is as good"),
        (judged((0.1, 0.3), (-0.001, 0.001)), "no gain", "scratch", "training from scratch is as good"),
        (judged((-0.1, 0.3)), "inconclusive", "none", "use more test rows (data.test, data.test_rows) to decide"),
        (judged(INFINITE, INFINITE), "inconclusive", "none", "use more test rows (data.test, data.test_rows) to decide"),
        (
            judged((0.1, 0.3), (-0.1, 0.2)),
            "inconclusive",
            "scratch",
            ("use more test rows or seeds (data.test, data.test_rows, search.repeats) to distinguish it from training from"),
        ),
        (judged((0.1, 0.3), None, (0.2, -0.4)), "inconclusive", "repeat", "use more seeds (search.repeats) to decide"),
        (judged((0.1, 0.3), (0.1, 0.2), (0.2, -0.4)), "inconclusive", "repeat", "use more seeds (search.repeats) to decide"),
        (
            judged((0.1, 0.3)).model_copy(update=A_SEED_FAILED),
            "inconclusive",
            "repeat",
            ("use more seeds (search.repeats) to decide"),
        ),
    ],
)
def test_what_decided_comes_first(transfer: TransferReport, kind: VerdictKind, decider: Decider, first: str) -> None:
    assert (transfer.verdict, decided_by(transfer)) == (kind, decider)
    advice = advice_after(transfer)
    assert advice[0].startswith(first)
    assert kind == "negative" or len(advice) == 1


def test_after_a_bundle_that_is_worse_than_the_base_come_the_rows_and_then_the_eval_set() -> None:
    serve, rows, eval_rows = advice_after(judged((-0.3, -0.1)))
    assert "serve the base model" in serve
    assert "`orchestrator data SPEC`" in rows
    assert eval_rows.startswith("give more or cleaner eval rows")


def test_what_a_person_promoted_need_not_have_looked_good_on_eval() -> None:
    assert advice_after(judged((-0.3, -0.1)), by_hand=True) == advice_after(judged((-0.3, -0.1)))[:2]


def test_nothing_is_advised_after_a_gain_or_without_a_verdict() -> None:
    assert advice_after(judged((0.1, 0.3))) == ()
    assert advice_after(TransferReport()) == ()


ENDS = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(lambda ends: (min(ends), max(ends)))


@given(ENDS, ENDS | st.none(), st.lists(st.floats(-1, 1), max_size=3).map(tuple))
def test_every_verdict_that_is_not_positive_has_its_advice(
    none: Interval, scratch: Interval | None, seeds: tuple[float, ...]
) -> None:
    transfer = judged(none, scratch, seeds)
    assert bool(advice_after(transfer)) == (transfer.verdict != "positive")
