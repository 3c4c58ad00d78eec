"""One trial on either executor, each with one rank and with two, step by step."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.anatomy import read_anatomy

from .test_ranks import Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

NUM_STEPS = 50
TOLERANCE = 1e-3
NORM_TOLERANCE = 3e-2
"""Adam and clipping hide a gradient that is too large by a factor; its norm does not."""
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("executors")
    make_base(folder / "base")
    make_sets(folder)
    matrix = Matrix(folder, read_anatomy(folder / "base", need_weights=True))
    for dtype in DTYPES:
        torch_alone = plan(None, dtype=dtype)
        one_rank = plan(1, dtype=dtype).model_copy(update={"ranks": 1})
        two_torch = torch_alone.model_copy(update={"ranks": 2})
        ways = {"torch": torch_alone, "two-torch": two_torch, "one-rank": one_rank, "two-ranks": plan(2, dtype=dtype)}
        for name, execution in ways.items():
            matrix.host("none", execution)
            matrix.trial(f"{dtype}-{name}", execution, num_steps=NUM_STEPS)
    matrix.run(1)
    matrix.run(2)
    return matrix


ENGINES = {"two-torch": ("torch", 2), "one-rank": ("deepspeed", 1), "two-ranks": ("deepspeed", 2)}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fifty_steps_are_the_same_on_either_executor(matrix: Matrix, dtype: str, name: str) -> None:
    ours, theirs = matrix.losses(f"{dtype}-{name}"), matrix.losses(f"{dtype}-torch")
    assert len(ours) == len(theirs) == NUM_STEPS
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE)
    norms = [[line["grad_norm"] for line in matrix.steps(f"{dtype}-{each}")] for each in (name, "torch")]
    np.testing.assert_allclose(norms[0], norms[1], rtol=NORM_TOLERANCE)
    assert theirs[-1] < 0.8 * theirs[0], "a trial that does not learn proves nothing"
    results = [matrix.results[f"{dtype}-{each}"] for each in (name, "torch")]
    assert results[0].eval_loss == pytest.approx(results[1].eval_loss, rel=TOLERANCE)
    engines = [(result.engine.executor, result.engine.ranks) for result in results if result.engine is not None]
    assert engines == [ENGINES[name], ("torch", 1)]
