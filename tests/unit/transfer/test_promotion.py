"""Who is promoted, who is not, and what is advised."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.transfer import Comparison, pareto_front, promote, score
from orchestrator.transfer.records import Control, RungRecord, TrialRecord


def trial(
    name: str,
    loss: float | None,
    lost: float | None = 0.0,
    *,
    control: Control | None = None,
    rate: float = 1e-3,
    state: Literal["running", "finished", "stopped", "failed"] = "finished",
    layers: str = "last:4",
    reason: str = "",
) -> TrialRecord:
    rungs = ()
    if loss is not None:
        rungs = (RungRecord(step=90, tokens=1000, metric=loss, forgetting=lost, score=score(loss, False, lost, 0.1)),)
    return TrialRecord(
        trial_id=name, number=0, control=control, layers=layers, tune="lora", lora_rank=8, learning_rate=rate, state=state,
        rungs=rungs, reason=reason, total_steps=90,
    )  # fmt: skip


BASE = trial("none", 3.0, control="none")


def test_the_best_score_wins() -> None:
    assert promote([BASE, trial("a", 2.0), trial("b", 1.8), trial("c", 2.5)], BASE, 0.1).trial_id == "b"


def test_head_may_win_and_other_controls_may_not() -> None:
    found = promote(
        [BASE, trial("a", 2.0), trial("head", 1.9, control="head"), trial("shuffled", 1.5, control="shuffled")], BASE, 0.1
    )
    assert found.trial_id == "head"


def test_a_trial_beyond_the_bound_is_passed_over_and_the_reason_says_so() -> None:
    found = promote([BASE, trial("fast", 1.0, 0.15), trial("safe", 2.0, 0.1)], BASE, 0.1)
    assert found.trial_id == "safe"
    assert "1 forgot more than 0.1" in found.reason


@pytest.mark.parametrize("state", ["failed", "running"])
def test_only_measured_ends_count(state: Literal["failed", "running"]) -> None:
    assert promote([trial("a", 1.0, state=state), trial("b", 2.0, state="stopped")], BASE, 0.1).trial_id == "b"
    assert promote([trial("nan", math.nan), trial("b", 2.0)], BASE, 0.1).trial_id == "b"


def test_higher_is_better_turns_the_comparison_with_the_base() -> None:
    base = trial("none", 0.4, control="none")
    assert promote([trial("a", 0.3)], base, 0.1, higher_is_better=True, metric="accuracy").trial_id is None
    assert promote([trial("a", 0.6)], base, 0.1, higher_is_better=True, metric="accuracy").trial_id == "a"


def test_an_interval_decides_where_there_is_one() -> None:
    """A point estimate below the base is not negative while its interval holds zero."""
    wide = Comparison(mean=-0.01, low=-0.2, high=0.18, method="bootstrap", num_examples=300)
    below = Comparison(mean=-0.1, low=-0.2, high=-0.01, method="bootstrap", num_examples=300)
    assert promote([trial("a", 3.01)], BASE, 0.1, comparisons={"a": wide}).trial_id == "a"
    assert promote([trial("a", 3.1)], BASE, 0.1, comparisons={"a": below}).trial_id is None


def test_nothing_as_good_as_the_base() -> None:
    found = promote([trial(f"t{n}", 3.1 + n, rate=10.0**-n) for n in range(1, 5)], BASE, 0.1)
    assert found.trial_id is None
    assert "as good as the base model" in found.reason
    assert found.advice[0].startswith("raise search.learning_rate for lora: the best rate, 1.0e-01")


def scored_at(metrics: tuple[float, ...], *, judged: int | None = None, rate: float = 1e-3) -> TrialRecord:
    """A trial with these metrics at steps 30, 60, ..."""
    rungs = tuple(
        RungRecord(rung=n, step=30 * (n + 1), tokens=1, metric=metric, score=metric) for n, metric in enumerate(metrics)
    )
    return trial("a", None, rate=rate).model_copy(update={"rungs": rungs, "judged_rung": judged})


LABEL = "last:4 · lora r8 · lr 1.0e-03"
RAISE, LOWER = f"raise train.epochs: {LABEL} was still improving", f"rows: {LABEL} got worse"


@pytest.mark.parametrize(
    ("metrics", "judged", "higher", "said"),
    [
        ((3.5, 3.2), None, False, f"{RAISE}, from 3.5 at step 30 to 3.2 at step 60"),
        ((3.2, 3.5), None, False, f"{LOWER}, from 3.2 at step 30 to 3.5 at step 60"),
        ((3.5, 3.2), 1, False, f"{RAISE}, from 3.5 at step 30 to 3.2 at step 60"),
        ((3.5, 3.2, 3.4, 3.3), 1, False, f"{LOWER}, from 3.2 at step 60 to 3.3 at step 120"),
        ((3.5, 3.2, 3.1), 1, False, ""),
        ((3.2, 3.20001), None, False, ""),
        ((math.nan, 3.2), None, False, ""),
        ((3.2, math.nan), 0, False, ""),
        ((3.2,), None, False, ""),
        ((0.2, 0.3), None, True, f"{RAISE}, from 0.2 at step 30 to 0.3 at step 60"),
        ((0.3, 0.2), None, True, f"{LOWER}, from 0.3 at step 30 to 0.2 at step 60"),
    ],
)
def test_more_epochs_are_advised_to_what_still_gets_better(
    metrics: tuple[float, ...], judged: int | None, higher: bool, said: str
) -> None:
    base = trial("none", 0.4 if higher else 3.0, control="none")
    found = promote([scored_at(metrics, judged=judged)], base, 0.1, higher_is_better=higher)
    assert found.trial_id is None
    assert [line for line in found.advice if "train.epochs" in line] == [line for line in found.advice if said and said in line]
    assert any(said in line for line in found.advice)


def test_no_higher_rate_is_advised_to_what_gets_worse() -> None:
    others = [trial(f"t{n}", 4.0, rate=10.0**-n) for n in range(2, 5)]
    advised = {
        last: promote([scored_at((3.2, last), rate=0.1), *others], BASE, 0.1).advice[0].split(":")[0] for last in (3.1, 3.3)
    }
    assert advised == {
        3.1: "raise search.learning_rate for lora",
        3.3: "lower search.learning_rate or train.epochs, or train on more rows",
    }


def test_all_forget_too_much() -> None:
    found = promote([trial("a", 1.0, 0.5, rate=5e-3), trial("b", 1.5, 0.213, rate=1e-3)], BASE, 0.1)
    assert found.trial_id is None
    assert found.advice[0].startswith("lower search.learning_rate below 1.0e-03")
    assert any("max_forgetting: 0.22" in line for line in found.advice)


def test_all_failed() -> None:
    found = promote([trial("a", None, state="failed", reason="the loss became nan") for _ in range(3)], BASE, 0.1)
    assert found.trial_id is None
    assert "fix why 3 of 3 trials failed: the loss became nan" in found.advice[0]


def test_no_retention_set_bounds_nothing() -> None:
    assert promote([trial("a", 2.0, None)], BASE, 0.0).trial_id == "a"


def test_pareto_front_by_hand() -> None:
    points = [(2.0, 0.0), (1.0, 0.2), (1.5, 0.1), (1.6, 0.1), (math.nan, 0.0), (1.5, 0.1)]
    assert pareto_front(points) == [1, 2, 5, 0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)
    for index, (x, y) in enumerate(points):
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        assert (index in front) == (not beaten)


@pytest.mark.parametrize("remedies", [(), ("replay",), ("product",), ("replay", "product")])
def test_replay_and_anchor_are_advised_where_the_closest_trial_had_none(remedies: tuple[str, ...]) -> None:
    closest = trial("a", 1.0, 0.5).model_copy(update={"remedy_kinds": remedies})
    advice = " ".join(promote([BASE, closest], BASE, 0.1).advice)
    assert ("search.replay" in advice) == ("replay" not in remedies)
    assert ("search.anchor" in advice) == ("product" not in remedies)
