"""Remedies over two real processes: under every ZeRO stage, and data-parallel, they do what they do in one process."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.anatomy import read_anatomy
from orchestrator.data import build_set
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.remedies import AnchorPlan, Remedies

from .test_ranks import Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TOLERANCE = 1e-5
REMEDIES = {
    "plain": Remedies(),
    "nothing": Remedies(anchor=AnchorPlan(kind="l2sp", strength=0.0)),
    "l2sp": Remedies(anchor=AnchorPlan(kind="l2sp", strength=300.0)),
    "held": Remedies(anchor=AnchorPlan(kind="l2sp", strength=1e9)),
    "ewc": Remedies(anchor=AnchorPlan(kind="ewc", strength=300.0)),
    "all": Remedies(replay=0.3, anchor=AnchorPlan(kind="ewc", strength=30.0), layer_decay=0.5),
}
WAYS: dict[str, ExecutionPlan] = {
    "one": plan(None, dtype="float32"),
    "two": plan(None, dtype="float32").model_copy(update={"ranks": 2}),
    **{f"z{stage}": plan(stage, dtype="float32") for stage in (0, 1, 2, 3)},
}
ROUNDED: dict[str, ExecutionPlan] = {f"b{stage}": plan(stage) for stage in (0, 1, 3)}
"""In bfloat16, where DeepSpeed keeps its masters elsewhere."""
MANY = [way for way in WAYS if way != "one"]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("remedies")
    make_base(folder / "base")
    make_sets(folder)
    generator = np.random.default_rng(5)
    texts = [generator.integers(3, 300, size=n) for n in generator.integers(10, 40, size=12)]
    build_set([(ids, np.ones(len(ids), bool)) for ids in texts]).save(folder / "replay.npz")
    matrix = Matrix(folder, read_anatomy(folder / "base", need_weights=True))
    for way, execution in WAYS.items():
        matrix.host("none", execution)
        for name, remedies in REMEDIES.items():
            matrix.trial(f"{way}-{name}", execution, tune="full", remedies=remedies)
        matrix.trial(f"{way}-plain-again", execution, tune="full")
    for way, execution in ROUNDED.items():
        matrix.host("none", execution)
        for name in ("plain", "nothing", "held", "plain-again"):
            matrix.trial(f"{way}-{name}", execution, tune="full", remedies=REMEDIES.get(name, Remedies()))
    matrix.run(1)
    matrix.run(2)
    shutil.copytree(folder / "fisher", folder / "measured")
    for file in (folder / "fisher").glob("*-rank1.safetensors"):
        file.unlink()
    (folder / "meeting-2").unlink(missing_ok=True)
    matrix.jobs[2].clear()
    matrix.host("none", WAYS["z2"])
    matrix.trial("z2-ewc-again", WAYS["z2"], tune="full", remedies=REMEDIES["ewc"])
    matrix.run(2)
    return matrix


@pytest.mark.parametrize("way", MANY)
@pytest.mark.parametrize("name", ["plain", "l2sp", "ewc", "all"])
def test_two_ranks_do_what_one_does(matrix: Matrix, way: str, name: str) -> None:
    np.testing.assert_allclose(matrix.losses(f"{way}-{name}"), matrix.losses(f"one-{name}"), rtol=TOLERANCE)
    ours, theirs = matrix.artifact(f"{way}-{name}"), matrix.artifact(f"one-{name}")
    moved = max(float((theirs[key] - start(matrix)[key]).abs().max()) for key in theirs)
    apart = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
    assert apart < 0.02 * moved, f"{apart} of {moved}"


def start(matrix: Matrix) -> dict[str, torch.Tensor]:
    """What the base has where trials learn: the one that is held by a very strong anchor, rounded nowhere."""
    return {key: value.float() for key, value in load_file(matrix.folder / "base" / "model.safetensors").items()}


@pytest.mark.parametrize("way", [*WAYS, *ROUNDED])
def test_an_anchor_without_strength_is_plain_training_and_a_very_strong_one_moves_nothing(matrix: Matrix, way: str) -> None:
    assert matrix.bits(f"{way}-nothing") == matrix.bits(f"{way}-plain") == matrix.bits(f"{way}-plain-again")
    held, free, base = matrix.artifact(f"{way}-held"), matrix.artifact(f"{way}-plain"), start(matrix)
    assert max(float((held[key] - base[key]).abs().max()) for key in held) < 1e-7
    assert max(float((free[key] - base[key]).abs().max()) for key in free) > 1e-4


def test_the_fisher_information_is_that_of_one_rank(matrix: Matrix) -> None:
    """Whatever the layout: ranks have a part each, padded with nothing, or all of it each."""
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for file in sorted((matrix.folder / "measured").glob("*-rank*.safetensors")):
        masters = [master.flatten() for master in load_file(file).values()]
        found.setdefault((file.name.partition("-")[0], len(masters)), []).append(torch.cat(masters))
    singles = [(count, parts[0]) for (_, count), parts in found.items() if len(parts) == 1]
    alone = max((values for _, values in singles), key=len)
    of_zero3 = [[values for each, values in singles if each == count and len(values) < len(alone)] for count in (1, 2)]
    several = [torch.cat(parts) for parts in (*found.values(), *of_zero3) if len(parts) == 2]
    assert len(several) == 10  # torch, ZeRO 0, 1, 2 and 3, each for two sets of rates
    for values in several:
        whole = round(len(values) / len(alone))
        most = values.sort().values[-1000 * whole :: whole]
        torch.testing.assert_close(most, alone.sort().values[-1000:], rtol=1e-4, atol=0.0)
        assert float(values.double().sum()) == pytest.approx(whole * float(alone.double().sum()), rel=1e-6)


def test_what_one_rank_has_lost_is_measured_again_by_all(matrix: Matrix) -> None:
    """A gang that died between two ranks' writing, or another gang that is about to write the second part."""
    assert matrix.bits("z2-ewc-again") == matrix.bits("z2-ewc")


def test_remedies_change_what_is_learned(matrix: Matrix) -> None:
    losses = {name: tuple(matrix.bits(f"one-{name}")) for name in ("plain", "l2sp", "ewc", "all")}
    assert len(set(losses.values())) == len(losses)


def test_replayed_tokens_are_there_and_are_counted(matrix: Matrix) -> None:
    """They come on top of the same documents of the target."""
    for way in WAYS:
        plain, replayed = (matrix.steps(f"{way}-{name}")[-1]["tokens"] for name in ("plain", "all"))
        assert 1 - plain / replayed == pytest.approx(0.3, abs=0.03)
