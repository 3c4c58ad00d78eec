"""Memory that runs out on one of two ranks: both hear of it, and the gang goes on smaller, as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.anatomy import read_anatomy
from orchestrator.work.execution import ExecutionPlan, TrunkPlan
from orchestrator.work.results import RungResult

from .test_ranks import Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STAGES = (0, 1)
STEPS_DOWN = {
    0: ["1 row per micro-batch", "gradient checkpointing", "ZeRO-1", "ZeRO-2"],
    1: ["1 row per micro-batch", "gradient checkpointing", "ZeRO-2"],
}
GROUPS = {"pair": "last:2", "full": "last:3", "slow": "last:1"}
"""By what becomes of it (`cramped_worker.py`), what learns: other cuts are other kinds of batches."""
WIDTHS = {"pair": 2, "full": 2, "slow": 1}


def planned(stage: int | None, **changes: object) -> ExecutionPlan:
    return plan(stage, dtype="float32").model_copy(update={"ranks": 2, **changes})


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("relief")
    make_base(folder / "base")
    make_sets(folder)
    anatomy = read_anatomy(folder / "base", need_weights=True)
    matrix = Matrix(folder, anatomy, Path(__file__).with_name("cramped_worker.py"))
    matrix.host("none", planned(1, micro_batch_rows=2))
    for stage in STAGES:
        for kind in ("rows", "ladder"):
            matrix.trial(f"z{stage}-{kind}", planned(stage, micro_batch_rows=2), tune="full")
        matrix.trial(f"z{stage}-small", planned(stage, micro_batch_rows=1), tune="full")
    matrix.trial("foot", planned(2, micro_batch_rows=1, checkpointing=True), tune="full")
    whole = planned(None, micro_batch_rows=2)
    matrix.host("none", whole)
    matrix.trial("torch-rows", whole, tune="full")
    matrix.trial("torch-small", planned(None, micro_batch_rows=1), tune="full")
    matrix.trial("torch-never", whole, tune="full", stop=1)
    for kind, policy in GROUPS.items():
        rates = {f"{rate}-{kind}": rate for rate in (1e-3, 2e-3, 3e-3, 4e-3)}
        matrix.group(rates, whole, width=4 if kind == "pair" else None, policy=policy, stop=1)
    matrix.trial("trunk", whole, trunk=TrunkPlan(cuts=(2,), num_bytes=0, folder=str(folder / "trunk"), max_bytes=10**9), stop=1)
    matrix.run(2)
    return matrix


def steps_down(result: RungResult) -> list[str]:
    """Without what is said where a checkpoint was still being written as memory ran out."""
    return [note for note in result.notes if "is released" not in note]


def assert_reduced(matrix: Matrix, name: str, counterpart: str, down: list[str]) -> None:
    assert matrix.bits(name) == matrix.bits(counterpart), name
    smaller = matrix.results[counterpart].engine
    assert smaller is not None
    for result in matrix.every_rank[name]:
        assert result.state == "done", result.reason
        steps = steps_down(result)
        assert len(steps) == len(down)
        assert all(words in note for words, note in zip(down, steps, strict=True)), result.notes
        assert result.reduced_execution is not None
        assert result.reduced_execution.zero_stage == smaller.zero_stage
        assert result.engine is not None
        assert result.engine.live_engines == 1
    assert matrix.results[name].eval_loss == matrix.results[counterpart].eval_loss


@pytest.mark.parametrize("stage", STAGES)
def test_a_reduced_trial_has_the_numbers_of_a_smaller_plan(matrix: Matrix, stage: int) -> None:
    """To the last bit, from one step down and from the foot of the ladder, with nothing of an engine left behind."""
    assert_reduced(matrix, f"z{stage}-rows", f"z{stage}-small", STEPS_DOWN[stage][:1])
    assert_reduced(matrix, f"z{stage}-ladder", "foot", STEPS_DOWN[stage])


def test_without_deepspeed_too(matrix: Matrix) -> None:
    assert_reduced(matrix, "torch-rows", "torch-small", STEPS_DOWN[1][:1])
    for result in matrix.every_rank["torch-never"]:
        assert (result.state, len(steps_down(result))) == ("failed", 2)
        assert "resources.zero: 3, which partitions (shards) the base across ranks" in result.reason


@pytest.mark.parametrize("kind", GROUPS)
def test_ranks_agree_how_many_trials_share_a_batch(matrix: Matrix, kind: str) -> None:
    """Where one runs out of memory, as it trains or as it measures; and where one finds that sharing does not pay there."""
    results = [result for name in matrix.results if name.endswith(kind) for result in matrix.every_rank[name]]
    assert [result.state for result in results] == ["done"] * 8
    assert {result.engine.fused_trials for result in results if result.engine is not None} == {WIDTHS[kind]}
    notes = [note for result in results for note in result.notes]
    said = "trials per batch reduced from 4 to 2" if kind == "pair" else f"{WIDTHS[kind]} trials share a batch"
    assert sum(said in note for note in notes) == 2, notes


def test_what_one_rank_cannot_store_none_stores(matrix: Matrix) -> None:
    for result in matrix.every_rank["trunk"]:
        assert result.state == "done"
        assert any("no room for what is stored" in note for note in result.notes)
        assert result.engine is not None
        assert result.engine.trunk_cut is None
