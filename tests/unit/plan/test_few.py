"""What few examples change in the plan, and that more of them change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.plan import make_plan, rung_steps
from orchestrator.plan.schedule import asha_time, even_rung_steps, surviving_share
from orchestrator.plan.values import RunPlan


@pytest.fixture
def plan(base: Any, job: Any, cores: Any, data: Any) -> Any:
    def build(documents: int, **search: Any) -> RunPlan:
        loaded, size = job(search={"layers": ["last:1"], **search}), data(train_documents=documents)
        return make_plan(loaded, base("tiny"), size, cores(), job="sweep", spec_sha256="0" * 64)

    return build


def test_up_to_500_documents_have_seeds_and_early_stopping(plan: Any) -> None:
    few, more = plan(500), plan(501)
    assert (few.search.repeats, few.search.patience) == (5, 2)
    assert few.search.rung_steps == (12, 23, 34, 45, 57, 68, 79, 90)
    assert "only 500 documents: the winner is trained with 5 seeds, and trials are scored 8 times" in few.reasons
    assert "trials are compared after 12 and 34 steps; the best of every 3 trials continues" in few.reasons
    assert "a trial ends early when neither its eval loss nor its score has improved at 2 scorings in a row" in few.reasons
    assert (more.search.repeats, more.search.patience) == (1, None)
    assert more.search.rung_steps == rung_steps(90) == (10, 30, 90)
    assert "trials are compared after 10, 30, 90 steps; the best of every 3 trials continues" in more.reasons
    assert not any("documents:" in line for line in more.reasons)


def test_what_the_spec_says_goes_before(plan: Any) -> None:
    assert plan(500, repeats=2).search.repeats == 2
    assert plan(5000, repeats=3).search.repeats == 3
    alone = plan(500, repeats=1, scheduler="none")
    assert (alone.search.repeats, alone.search.patience, alone.search.rung_steps) == (1, None, (90,))
    assert not any("documents:" in line for line in alone.reasons)


@pytest.mark.parametrize(
    ("steps", "rungs"),
    [(90, (12, 23, 34, 45, 57, 68, 79, 90)), (30, (5, 9, 13, 18, 22, 26, 30)), (9, (5, 9)), (7, (7,)), (1, (1,))],
)
def test_points_are_evenly_spaced_and_four_steps_apart(steps: int, rungs: tuple[int, ...]) -> None:
    assert even_rung_steps(steps) == rungs
    assert even_rung_steps(2 * steps, budget=0.5) == rungs


def test_asha_compares_at_the_first_and_at_the_third_point(plan: Any) -> None:
    few, more = plan(500).search, plan(501).search
    assert [asha_time(few, rung) for rung in range(8)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [surviving_share(few, rung) for rung in range(8)] == pytest.approx([1, 1 / 3, 1 / 3, *[1 / 9] * 5])
    assert [asha_time(more, rung) for rung in range(3)] == [1, 3, 9]
    assert [surviving_share(more, rung) for rung in range(3)] == pytest.approx([1, 1 / 3, 1 / 9])
