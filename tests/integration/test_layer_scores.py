"""Blocks chosen by score: a real sweep scores them once, and one that is submitted again trains the same blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan.values import RunPlan
from orchestrator.store import read_json
from orchestrator.work.measurements import LayerScores

from .runs import TIMEOUT_S, events_of, result_of, run_folder, submit, sweep_of, transfer_of, trials_of, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3 * TIMEOUT_S)]

SEARCH: dict[str, Any] = {
    "layers": ["last:1", "top:0.5"],
    "learning_rate": {"lora": [2e-3, 2e-2]},
    "lora_rank": [4],
    "trials": 2,
    "scheduler": "none",
    "max_forgetting": 10,
}


def best_half(found: LayerScores) -> tuple[int, ...]:
    ranked = sorted(range(len(found.scores)), key=lambda block: -(found.scores[block] or 0.0))
    return tuple(sorted(ranked[: -(-len(ranked) // 2)]))


@pytest.mark.slow  # every sweep with several choices scores its blocks; this one looks at all that follows
def test_a_sweep_scores_its_blocks_once(tmp_path: Path, ray_here: None) -> None:
    spec = write_spec(tmp_path, "by-score", search=SEARCH, resources={"gangs": 1, "ranks_per_gang": 1})
    assert submit("sweep", spec) == 0
    run = run_folder(spec)
    found = LayerScores.model_validate(read_json(run / "layer_scores.json"))
    plan = RunPlan.model_validate(read_json(run / "plan.json"))
    assert plan.probe is not None
    assert (plan.probe.num_batches, plan.probe.rows) == (1, 1), "the least there is, for trials as small as these"
    by_score = plan.search.options[1]
    assert by_score.layers == by_score.selection.policy == "top:0.5"
    assert not by_score.selection.pending
    assert by_score.selection.blocks == best_half(found)
    assert [entry.trial.layers for entry in trials_of(run)] == ["last:1", "top:0.5"], "few examples: the upper block alone first"
    assert len(events_of(run, "blocks_scored")) == 1
    engine = result_of(run, trials_of(run)[1].trial.trial_id).engine
    assert engine is not None
    assert engine.trainable_parameters == by_score.selection.num_trainable_parameters
    assert engine.base_loads == 1
    ordinals = [trial.engine.ordinal for trial in sweep_of(run).trials if trial.engine is not None]
    assert sorted(ordinals) == [0, 2, 3, 4], "the gang's second work, after the untouched base, was the probe"
    assert transfer_of(run).verification is not None
    assert "Blocks by score" in (run / "report.html").read_text()

    written = (run / "layer_scores.json").stat().st_mtime_ns
    values = json.loads(spec.read_text())
    values["search"]["trials"] = 3
    spec.write_text(json.dumps(values))
    assert submit("sweep", spec) == 0
    assert len(trials_of(run)) == 3
    assert (run / "layer_scores.json").stat().st_mtime_ns == written
    assert len(events_of(run, "blocks_scored")) == 1
    again = RunPlan.model_validate(read_json(run / "plan.json"))
    assert again.search is not None
    assert again.search.options == plan.search.options
    assert again.search.shares == plan.search.shares
