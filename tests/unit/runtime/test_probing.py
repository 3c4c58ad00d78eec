"""Scoring the blocks in a run: once, whatever comes of it, and recorded."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.anatomy import read_anatomy
from orchestrator.errors import TrainingError
from orchestrator.plan.values import RunPlan
from orchestrator.report.terminal import LogView
from orchestrator.runtime.measurements import BlockScores, measure_once
from orchestrator.runtime.prepare import Prepared
from orchestrator.samples import SAMPLE_BASE
from orchestrator.store import read_json, read_jsonl
from orchestrator.work.assignment import Measurement, ScoreBlocks
from orchestrator.work.failure import Failure
from orchestrator.work.measurements import LayerScores
from orchestrator.work.results import MeasurementResult


class Scorer:
    """A stand-in for the gang; what it was asked, and what it answers."""

    def __init__(self, reason: str = "") -> None:
        self.asked: list[Measurement] = []
        self.reason = reason

    def __call__(self, work: Measurement) -> MeasurementResult:
        self.asked.append(work)
        if self.reason:
            return work.failed(Failure(kind="training", message=self.reason))
        num_blocks = len(read_anatomy(SAMPLE_BASE, need_weights=False).linears)
        norms = tuple(float(num_blocks - block) for block in range(num_blocks))
        found = LayerScores(relative_gradient_norms=norms, signal_to_noise=(1.0,) * num_blocks, num_batches=4, seconds=0.1)
        return MeasurementResult(work_id=work.work_id, found=found, notes=("fewer rows",))


@pytest.fixture
def scored(submit: Callable[..., Prepared], shown: io.StringIO) -> Callable[..., Prepared]:
    """Submit the small sweep with these layers, and score its blocks by a stand-in."""

    def go(scorer: Scorer, *layers: str, **search: Any) -> Prepared:
        prepared = submit(search={"layers": list(layers), **search})
        return measure_once(BlockScores(prepared), LogView(shown), scorer)

    return go


def kinds(prepared: Prepared) -> list[str]:
    return [line["kind"] for line in read_jsonl(prepared.run.path / "events.jsonl")]


def blocks_of(plan: RunPlan) -> dict[str, tuple[int, ...]]:
    return {option.layers: option.selection.blocks for option in plan.search.options}


def test_a_run_is_scored_once_and_a_second_submission_reads_it(scored: Callable[..., Prepared], shown: io.StringIO) -> None:
    scorer = Scorer()
    first = scored(scorer, "last:1", "top:0.25")
    (asked,) = scorer.asked
    assert isinstance(asked, ScoreBlocks)
    assert (asked.work_id, asked.plan) == ("probe", first.plan.probe)
    chosen = blocks_of(first.plan)["top:0.25"]
    assert 0 in chosen, "this stand-in scores the lowest block highest"
    assert RunPlan.model_validate(read_json(first.run.plan)) == first.plan
    assert kinds(first).count("blocks_scored") == 1
    assert "trial_note" in kinds(first)
    assert "top:0.25 is blocks 0" in shown.getvalue()
    assert not (first.run.trials / "probe").exists(), "it is no trial"

    again = scored(Scorer("this must not be asked"), "last:1", "top:0.25", trials=5)
    assert blocks_of(again.plan)["top:0.25"] == chosen
    assert again.plan.search.shares == first.plan.search.shares
    assert kinds(again).count("blocks_scored") == 1


def test_where_no_policy_needs_it_the_search_goes_on_without_and_stays_so(
    scored: Callable[..., Prepared], shown: io.StringIO
) -> None:
    first = scored(Scorer("3 gangs died while running it"), "last:1", "all")
    assert first.plan.search.shares == ()
    assert kinds(first).count("blocks_not_scored") == 1
    assert "continues without scores: 3 gangs died" in shown.getvalue()
    scorer = Scorer()
    again = scored(scorer, "last:1", "all", trials=5)
    assert not scorer.asked, "an order that trials have begun by is kept"
    assert again.plan.search.shares == ()


def test_where_a_policy_needs_it_the_sweep_stops_and_is_tried_again(scored: Callable[..., Prepared]) -> None:
    with pytest.raises(TrainingError, match="could not be scored: out of memory") as told:
        scored(Scorer("out of memory"), "last:1", "top:0.25")
    assert "submit the same spec again" in told.value.remedy
    scorer = Scorer()
    assert scored(scorer, "last:1", "top:0.25").plan.search is not None
    assert len(scorer.asked) == 1


def test_without_a_choice_of_blocks_nothing_is_scored(scored: Callable[..., Prepared]) -> None:
    scorer = Scorer()
    prepared = scored(scorer, "last:1")
    assert not scorer.asked
    assert not prepared.run.layer_scores.exists()
