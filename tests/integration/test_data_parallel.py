"""Two ranks that each hold all of a trial: what they learn together is what one learns alone, and what DeepSpeed learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from orchestrator.anatomy import read_anatomy
from orchestrator.data import TokenizedSet
from orchestrator.train import TrainHost
from orchestrator.train.batches import RowPlan, StepPlan
from orchestrator.work.assignment import Work
from orchestrator.work.execution import BaseLoad, ExecutionPlan

from .test_ranks import NUM_STEPS, SKEWED_TOKENS_PER_STEP, Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORK: TypeAdapter[Any] = TypeAdapter(Work)
FLOAT32_TOLERANCE = 1e-5
ONE_DOCUMENT_TOKENS = 60
"""A step that has rows for one rank alone: the other's micro-batch is empty."""
SHARES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"tune": "full"},
    "skewed": {"train": "skewed", "tokens_per_step": SKEWED_TOKENS_PER_STEP},
    "empty": {"train": "skewed", "tokens_per_step": ONE_DOCUMENT_TOKENS},
}
RATES = {"5e-3": 5e-3, "1e30": 1e30, "1e-3": 1e-3}


def whole(dtype: str, ranks: int = 2) -> ExecutionPlan:
    return plan(None, dtype=dtype).model_copy(update={"ranks": ranks})


def run_here(matrix: Matrix) -> None:
    """The one-rank trials, in this process."""
    for job in matrix.jobs[1]:
        execution = ExecutionPlan.model_validate(job["execution"])
        host = TrainHost.create(BaseLoad.model_validate(job["base"]), matrix.anatomy, execution, 0, 1, None)
        for values in job["assignments"]:
            assignment = WORK.validate_python(values)
            matrix.results[assignment.trial.trial_id] = host.run(assignment)
        host.close()


def add_company(matrix: Matrix, execution: ExecutionPlan) -> None:
    """Two trials alone, and the same two with a neighbour that diverges."""
    for name in ("5e-3", "1e-3"):
        matrix.trial(f"{execution.dtype}-alone-{name}", execution, rate=RATES[name])
    matrix.group({f"{execution.dtype}-fused-{name}": rate for name, rate in RATES.items()}, execution, width=3)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("data-parallel")
    make_base(folder / "base")
    make_sets(folder)
    matrix = Matrix(folder, read_anatomy(folder / "base", need_weights=True))
    for name, execution in (("one", whole("float32", 1)), ("two", whole("float32")), ("zero", plan(1, dtype="float32"))):
        matrix.host("none", execution)
        for share, values in SHARES.items():
            matrix.trial(f"{name}-{share}", execution, **values)
        if name == "two":
            matrix.trial("failed", execution, tune="full", rate=1e30)
            add_company(matrix, execution)
            matrix.trial("resumed", execution, stop=2)
            matrix.trial("resumed", execution, start="resumed/rung-0", rung=1)
    matrix.host("none", whole("bfloat16"))
    add_company(matrix, whole("bfloat16"))
    matrix.run(2)
    matrix.host("none", whole("float32", 1))
    forget_owner(matrix.folder / "trials" / "resumed" / "rung-0", matrix.folder / "trials" / "unnamed" / "rung-0")
    matrix.trial("on-one", whole("float32", 1), start="unnamed/rung-0", rung=1)
    run_here(matrix)
    return matrix


def forget_owner(rung: Path, copy: Path) -> None:
    """A copy of a rung whose manifest names no trial, as older versions wrote it: any trial that it fits goes on from it."""
    shutil.copytree(rung, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"about": {}}))


def norms(matrix: Matrix, name: str) -> list[float]:
    return [line["grad_norm"] for line in matrix.steps(name)]


@pytest.mark.parametrize("other", ["one", "zero"])
@pytest.mark.parametrize("share", SHARES)
def test_two_ranks_learn_what_one_learns_and_what_deepspeed_learns(matrix: Matrix, share: str, other: str) -> None:
    """Also where one has ten times the supervised tokens of the other, and where one has none."""
    ours, theirs = f"two-{share}", f"{other}-{share}"
    assert len(matrix.losses(ours)) == NUM_STEPS
    np.testing.assert_allclose(matrix.losses(ours), matrix.losses(theirs), rtol=FLOAT32_TOLERANCE)
    np.testing.assert_allclose(norms(matrix, ours), norms(matrix, theirs), rtol=10 * FLOAT32_TOLERANCE)
    assert matrix.results[ours].eval_loss == pytest.approx(matrix.results[theirs].eval_loss, rel=FLOAT32_TOLERANCE)
    assert matrix.results[ours].tokens == matrix.results[theirs].tokens
    first, last = matrix.losses(ours)[0], matrix.losses(ours)[-1]
    assert share in ("skewed", "empty") or last < 0.99 * first, "a trial that does not learn proves nothing"


def test_a_rank_without_a_document_is_among_them(matrix: Matrix) -> None:
    data = TokenizedSet.load(matrix.folder / "skewed.npz")
    _, documents = next(StepPlan(data, ONE_DOCUMENT_TOKENS, 3).steps_from(0))
    shares = [RowPlan(64, 1, True, rank, 2).batches(data, documents) for rank in (0, 1)]
    assert [sum(batch.num_tokens for batch in share) > 0 for share in shares] == [True, False]


def test_the_record_shows_the_engine(matrix: Matrix) -> None:
    for result in matrix.every_rank["two-full"]:
        assert result.engine is not None
        assert (result.engine.executor, result.engine.engine_class, result.engine.ranks) == ("torch", "TorchEngine", 2)
        masters_and_moments = 12 * result.engine.trainable_parameters
        assert masters_and_moments <= result.engine.partitioned_bytes <= masters_and_moments + 8, "every rank holds all"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trials_that_share_a_batch_have_the_bits_that_they_have_alone(matrix: Matrix, dtype: str) -> None:
    for result in matrix.every_rank[f"{dtype}-fused-1e30"]:
        assert result.state == "failed"
        assert "became" in result.reason
    for rate in ("5e-3", "1e-3"):
        fused, alone = f"{dtype}-fused-{rate}", f"{dtype}-alone-{rate}"
        assert len(matrix.bits(fused)) == NUM_STEPS
        assert matrix.bits(fused) == matrix.bits(alone)
        assert norms(matrix, fused) == norms(matrix, alone)
        for result in matrix.every_rank[fused]:
            assert result.engine is not None
            assert (result.engine.fused_trials, result.engine.ranks) == (3, 2)
            assert (result.tokens, result.eval_loss) == (matrix.results[alone].tokens, matrix.results[alone].eval_loss)
        assert same_tensors(matrix.artifact(fused), matrix.artifact(alone))


def test_a_failed_trial_is_a_result_on_every_rank_and_leaves_the_next_its_bits(matrix: Matrix) -> None:
    assert [result.state for result in matrix.every_rank["failed"]] == ["failed", "failed"]
    assert matrix.bits("float32-alone-5e-3") == matrix.bits("two-lora")
    assert same_tensors(matrix.artifact("float32-alone-5e-3"), matrix.artifact("two-lora"))


def test_resumed_is_bit_identical(matrix: Matrix) -> None:
    assert matrix.results["resumed"].step == 2
    assert matrix.results["resumed#1"].notes == ()
    assert matrix.bits("resumed") == matrix.bits("two-lora")
    assert same_tensors(matrix.artifact("resumed#1"), matrix.artifact("two-lora"))


def test_masters_and_moments_are_saved_once(matrix: Matrix) -> None:
    rung = Path(matrix.results["resumed"].checkpoint or "")
    first, second = (set(load_file(rung / f"state-rank{rank}.safetensors")) for rank in (0, 1))
    assert first == {"master", "exp_avg", "exp_avg_sq", "step", "random.cpu"}
    assert second == {"random.cpu"}


def test_another_number_of_ranks_goes_on_with_masters_and_moments(matrix: Matrix) -> None:
    (note,) = matrix.results["on-one"].notes
    assert "was made by 2 ranks and is continued by 1" in note
    np.testing.assert_allclose(matrix.losses("on-one"), matrix.losses("two-lora")[2:], rtol=FLOAT32_TOLERANCE)
    np.testing.assert_allclose(norms(matrix, "on-one"), norms(matrix, "two-lora")[2:], rtol=10 * FLOAT32_TOLERANCE)


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_three_ranks_too(tmp_path: Path) -> None:
    """Of three numbers a sum depends on their order, of two it does not."""
    make_base(tmp_path / "base")
    make_sets(tmp_path)
    matrix = Matrix(tmp_path, read_anatomy(tmp_path / "base", need_weights=True), jobs={1: [], 3: []})
    for ranks in (1, 3):
        matrix.host("none", whole("float32", ranks))
        matrix.trial(f"{ranks}-ranks", whole("float32", ranks), rate=5e-3)
    matrix.group({f"fused-{name}": rate for name, rate in RATES.items()}, whole("float32", 3), width=3)
    matrix.run(3)
    run_here(matrix)
    assert matrix.bits("fused-5e-3") == matrix.bits("3-ranks")
    np.testing.assert_allclose(matrix.losses("3-ranks"), matrix.losses("1-ranks"), rtol=FLOAT32_TOLERANCE)
    np.testing.assert_allclose(norms(matrix, "3-ranks"), norms(matrix, "1-ranks"), rtol=10 * FLOAT32_TOLERANCE)
