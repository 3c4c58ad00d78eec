"""The stored trunk over two real processes: with the base in parts or whole, trials that begin from it learn what they learn
without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.anatomy import read_anatomy
from orchestrator.work.execution import TrunkPlan

from .test_ranks import NUM_STEPS, TOLERANCE, Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

CUTS = (2, 3, 4)
NUM_DOCUMENTS = 56
"""Of both sets."""
FLOAT32_TOLERANCE = 1e-6
"""The forward pass that fills the trunk multiplies other documents in one go than a step does, which may move last bits."""


def trunk_in(folder: Path) -> TrunkPlan:
    return TrunkPlan(cuts=CUTS, num_bytes=0, folder=str(folder), max_bytes=10**9)


def add_pair(matrix: Matrix, name: str, execution: Any, trunk: TrunkPlan, **trial: Any) -> None:
    """A trial that computes its trunk at every step, and the same trial from the stored one."""
    matrix.trial(name, execution, **trial)
    matrix.trial(f"{name}-stored", execution, trunk=trunk, **trial)


def add_stage(matrix: Matrix, stage: int) -> None:
    """The first trial with the trunk computes it; the later ones, after unfrozen weights, read what it left."""
    execution, trunk = plan(stage, dtype="float32"), trunk_in(matrix.folder / f"trunk-{stage}")
    matrix.host("none", execution)
    add_pair(matrix, f"z{stage}-lora", execution, trunk, policy="last:1")
    add_pair(matrix, f"z{stage}-full", execution, trunk, policy="last:1", tune="full")
    matrix.trial(f"z{stage}-lora-again", execution, policy="last:1", trunk=trunk)


def make_matrix(folder: Path) -> Matrix:
    make_base(folder / "base")
    make_sets(folder)
    return Matrix(folder, read_anatomy(folder / "base", need_weights=True))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    matrix = make_matrix(tmp_path_factory.mktemp("trunk"))
    add_stage(matrix, 3)
    wide = plan(3, dtype="float32")
    matrix.host("none", wide)
    matrix.trial("z3-lora-later", wide, policy="last:1", trunk=trunk_in(matrix.folder / "trunk-3"))
    add_stage(matrix, 2)
    matrix.run(2)
    return matrix


def check_pair(matrix: Matrix, name: str, cut: int, tolerance: float) -> None:
    plain, stored = matrix.results[name], matrix.results[f"{name}-stored"]
    assert (plain.state, stored.state) == ("done", "done")
    assert plain.engine is not None
    assert stored.engine is not None
    assert (plain.engine.trunk_cut, stored.engine.trunk_cut) == (None, cut)
    assert stored.eval_loss == pytest.approx(plain.eval_loss, rel=tolerance)
    assert stored.notes == ()


def check_steps(matrix: Matrix, name: str, tolerance: float) -> None:
    ours, without = matrix.losses(f"{name}-stored"), matrix.losses(name)
    assert len(ours) == len(without) == NUM_STEPS
    np.testing.assert_allclose(ours, without, rtol=tolerance)
    norms = [[line["grad_norm"] for line in matrix.steps(each)] for each in (f"{name}-stored", name)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=10 * tolerance)
    assert without[-1] < without[0] - 0.01 * without[0], "a trial that does not learn proves nothing"


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_learn_from_the_stored_trunk_what_they_learn_without(matrix: Matrix, stage: int, tune: str) -> None:
    check_pair(matrix, f"z{stage}-{tune}", 3, FLOAT32_TOLERANCE)
    check_steps(matrix, f"z{stage}-{tune}", FLOAT32_TOLERANCE)


def test_whole_bases_share_the_work_and_partitioned_ones_do_it_together(matrix: Matrix) -> None:
    assert sum(matrix.built["z2-lora-stored"]) == NUM_DOCUMENTS
    assert matrix.built["z3-lora-stored"] == [NUM_DOCUMENTS, NUM_DOCUMENTS]
    assert all(result.trunk_seconds > 0 for name in ("z2", "z3") for result in matrix.every_rank[f"{name}-lora-stored"])


@pytest.mark.parametrize("stage", [2, 3])
def test_later_trials_of_the_gang_compute_nothing_and_give_the_same_bits(matrix: Matrix, stage: int) -> None:
    for name in (f"z{stage}-full-stored", f"z{stage}-lora-again"):
        assert matrix.built[name] == [0, 0]
        assert [result.trunk_seconds for result in matrix.every_rank[name]] == [0.0, 0.0]
    assert matrix.bits(f"z{stage}-lora-again") == matrix.bits(f"z{stage}-lora-stored")
    before, after = (matrix.artifact(f"z{stage}-{name}") for name in ("lora-stored", "lora-again"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_later_gang_reads_what_the_first_one_stored(matrix: Matrix) -> None:
    assert matrix.built["z3-lora-later"] == [0, 0]
    assert all(result.trunk_seconds > 0 for result in matrix.every_rank["z3-lora-later"])
    assert matrix.bits("z3-lora-later") == matrix.bits("z3-lora-stored")


@pytest.mark.slow
def test_other_ways_and_kinds_of_trials(tmp_path: Path) -> None:
    """In parts: bf16, nf4, checkpointing, parameters on the host, a failed trial before, both controls, a trial resumed, one
    whose answers are generated by the whole model."""
    matrix, tight = make_matrix(tmp_path), plan(3, dtype="float32")
    trunk = trunk_in(tmp_path / "trunk")
    matrix.host("none", tight)
    matrix.trial("failed", tight, policy="last:1", tune="full", rate=1e30, trunk=trunk)
    add_pair(matrix, "checkpointing", plan(3, dtype="float32", checkpointing=True), trunk, policy="last:1")
    add_pair(matrix, "generating", tight, trunk, metric="exact_match")
    add_pair(matrix, "head", tight, trunk, policy="head", tune="full", control="head")
    add_pair(matrix, "none", tight, trunk, policy="none", control="none", stop=0)
    matrix.trial("resumed", tight, policy="last:1", trunk=trunk, stop=2)
    matrix.trial("resumed", tight, policy="last:1", trunk=trunk, start="resumed/rung-0", rung=1)
    for name, quantize, execution in (
        ("bf16", "none", plan(3)),
        ("nf4", "nf4", plan(3)),
        ("host", "none", plan(3, offload="parameters", dtype="float32")),
    ):
        matrix.host(quantize, execution)
        add_pair(matrix, name, execution, trunk, policy="last:1")
    matrix.run(2)
    assert matrix.results["failed"].state == "failed"
    for name, cut in (("checkpointing", 3), ("generating", 2), ("head", 4), ("host", 3), ("bf16", 3), ("nf4", 3)):
        tolerance = TOLERANCE if name in ("bf16", "nf4") else FLOAT32_TOLERANCE
        check_pair(matrix, name, cut, tolerance)
        check_steps(matrix, name, tolerance)
    check_pair(matrix, "none", 4, FLOAT32_TOLERANCE)
    assert matrix.results["generating"].metrics == matrix.results["generating-stored"].metrics
    assert matrix.bits("resumed") == matrix.bits("checkpointing-stored")
