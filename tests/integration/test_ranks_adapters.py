"""Every adapter kind under every engine, over two real processes, against one process that knows nothing of DeepSpeed."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.anatomy import read_anatomy
from orchestrator.spec.adapters import ADAPTER_KINDS, PLAIN_LORA, AdapterOptions

from .test_ranks import NUM_STEPS, TOLERANCE, Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

KINDS = [kind for kind in ADAPTER_KINDS if kind != PLAIN_LORA.kind]
STAGES = (1, 2, 3)
DROPOUT = AdapterOptions(kind="dora", dropout=0.2)


def add(matrix: Matrix, quantize: str, stage: int | None) -> None:
    """One host and its trials."""
    execution, ways = plan(stage), "one" if stage is None else f"z{stage}"
    matrix.host(quantize, execution)
    for kind in KINDS:
        matrix.trial(f"{ways}-{quantize}-{kind}", execution, adapter=AdapterOptions.model_validate({"kind": kind}), rate=1e-3)
    if stage in (None, 3):
        whole, cut = f"{ways}-{quantize}-dropout", f"{ways}-{quantize}-resumed"
        matrix.trial(whole, execution, adapter=DROPOUT)
        matrix.trial(cut, execution, adapter=DROPOUT, stop=2)
        matrix.trial(cut, execution, adapter=DROPOUT, start=f"{cut}/rung-0", rung=1)
    if stage == 3:
        matrix.trial(
            f"{ways}-{quantize}-checkpointing", plan(3, checkpointing=True), adapter=AdapterOptions(kind="dora"), rate=1e-3
        )


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("adapters")
    make_base(folder / "base")
    make_sets(folder)
    matrix = Matrix(folder, read_anatomy(folder / "base", need_weights=True))
    for quantize in ("none", "nf4"):
        for stage in (None, *STAGES):
            add(matrix, quantize, stage)
    matrix.run(1)
    matrix.run(2)
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(matrix: Matrix, stage: int, quantize: str, kind: str) -> None:
    ours, alone = matrix.losses(f"z{stage}-{quantize}-{kind}"), matrix.losses(f"one-{quantize}-{kind}")
    assert len(ours) == len(alone) == NUM_STEPS
    np.testing.assert_allclose(ours, alone, rtol=TOLERANCE)
    assert alone[-1] < alone[0] - 10 * TOLERANCE * alone[0], "a trial that does not learn proves nothing"
    saved, expected = matrix.artifact(f"z{stage}-{quantize}-{kind}"), matrix.artifact(f"one-{quantize}-{kind}")
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: tensor.shape for name, tensor in expected.items()}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_recomputed_blocks_learn_the_same(matrix: Matrix, quantize: str) -> None:
    np.testing.assert_allclose(
        matrix.losses(f"z3-{quantize}-checkpointing"), matrix.losses(f"one-{quantize}-dora"), rtol=TOLERANCE
    )


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("ways", ["one", "z3"])
def test_a_resumed_trial_drops_out_the_same(matrix: Matrix, ways: str, quantize: str) -> None:
    whole = matrix.bits(f"{ways}-{quantize}-dropout")
    assert len(whole) == NUM_STEPS
    assert matrix.bits(f"{ways}-{quantize}-resumed") == whole
    assert matrix.losses(f"{ways}-{quantize}-dropout") != matrix.losses(f"{ways}-{quantize}-dora")
