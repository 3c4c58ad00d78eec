"""Memory that runs out on one of two ranks, at ZeRO 0 and 1: both hear of it, and the gang goes on smaller, as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.anatomy import read_anatomy
from orchestrator.plan.values import ExecutionPlan

from .test_ranks import Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STAGES = (0, 1)
STEPS_DOWN = {
    0: ["1 row in a micro-batch", "gradient checkpointing", "ZeRO-1", "ZeRO-2"],
    1: ["1 row in a micro-batch", "gradient checkpointing", "ZeRO-2"],
}


def planned(stage: int, **changes: object) -> ExecutionPlan:
    return plan(stage, dtype="float32").model_copy(update=changes)


def test_a_relieved_trial_has_the_numbers_of_a_smaller_plan(tmp_path: Path) -> None:
    """To the last bit, from one step down and from the foot of the ladder, with nothing of an engine left behind."""
    make_base(tmp_path / "base")
    make_sets(tmp_path)
    anatomy = read_anatomy(tmp_path / "base", need_weights=True)
    matrix = Matrix(tmp_path, anatomy, Path(__file__).with_name("cramped_worker.py"))
    matrix.host("none", planned(1, micro_batch_rows=2))
    for stage in STAGES:
        for kind in ("rows", "ladder"):
            matrix.trial(f"z{stage}-{kind}", planned(stage, micro_batch_rows=2), tune="full")
        matrix.trial(f"z{stage}-small", planned(stage, micro_batch_rows=1), tune="full")
    matrix.trial("foot", planned(2, micro_batch_rows=1, checkpointing=True), tune="full")
    matrix.run(2)
    for stage in STAGES:
        for kind, counterpart, down in (
            ("rows", f"z{stage}-small", STEPS_DOWN[stage][:1]),
            ("ladder", "foot", STEPS_DOWN[stage]),
        ):
            name = f"z{stage}-{kind}"
            assert matrix.bits(name) == matrix.bits(counterpart), name
            smaller = matrix.results[counterpart].engine
            assert smaller is not None
            for result in matrix.every_rank[name]:
                assert result.state == "done", result.reason
                assert len(result.notes) == len(down)
                assert all(words in note for words, note in zip(down, result.notes, strict=True)), result.notes
                assert result.relieved is not None
                assert result.relieved.zero_stage == smaller.zero_stage
                assert result.engine is not None
                assert result.engine.live_engines == 1
            assert matrix.results[name].eval_loss == matrix.results[counterpart].eval_loss
