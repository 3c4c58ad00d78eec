"""The features of the domain shift: means of hidden states, from what is stored or made anew alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data import TokenizedSet, build_set
from orchestrator.train.batches import RowPlan
from orchestrator.train.integrity import base_fingerprint
from orchestrator.train.measure.measurement import measure_shift
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import objective_of
from orchestrator.train.ranks import ALONE
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.work.execution import DataPaths, TrunkPlan
from orchestrator.work.measurements import ShiftPlan

PLAN = ShiftPlan(cuts=(1, 2), num_documents=40)
ROWS = RowPlan(64, 4, pack=True)


def drawn(seed: int, low: int, high: int, count: int = 60) -> TokenizedSet:
    generator = np.random.default_rng(seed)
    documents = [generator.integers(low, high, size=n) for n in generator.integers(8, 20, size=count)]
    return build_set([(ids, np.ones(len(ids), bool)) for ids in documents])


@pytest.fixture
def base(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> LoadedBase:
    return base_of(llama_folder())


def parts(base: LoadedBase, sets: dict[str, TokenizedSet]) -> tuple[TrunkLibrary, TrunkBuilder]:
    objective = objective_of(base, base.model.lm_head)
    library = TrunkLibrary(base, base_fingerprint(base.model), ALONE, sets.__getitem__)
    return library, TrunkBuilder(base, objective, ROWS, ALONE, partitioned=False)


def test_other_tokens_lie_far_and_the_same_ones_near(base: LoadedBase) -> None:
    sets = {"same": drawn(0, 3, 90), "again": drawn(1, 3, 90), "other": drawn(2, 50, 60)}
    library, builder = parts(base, sets)
    near = measure_shift(PLAN, ("same", sets["same"]), ("again", sets["again"]), library, builder, 0)
    far = measure_shift(PLAN, ("same", sets["same"]), ("other", sets["other"]), library, builder, 0)
    assert [block.cut for block in near.blocks] == [1, 2]
    assert (near.target_documents, near.retention_documents) == (40, 40)
    assert all(block.low == 0 for block in near.blocks)
    assert all(block.low > 1 for block in far.blocks)


def test_what_is_stored_of_the_trunk_is_read_and_says_the_same(base: LoadedBase, tmp_path: Path) -> None:
    sets = {"train": drawn(0, 3, 90), "retain": drawn(2, 40, 70)}
    library, builder = parts(base, sets)
    sides = ("train", sets["train"]), ("retain", sets["retain"])
    made = measure_shift(PLAN, *sides, library, builder, 0)
    trunk = TrunkPlan(cuts=(1, 2), num_bytes=0, folder=str(tmp_path), max_bytes=10**9)
    objective = objective_of(base, base.model.lm_head)
    library.open(trunk, DataPaths(train="train", eval="retain"), ROWS, objective, partitioned=False, note=pytest.fail)
    calls: list[int] = []

    class Unused:
        def build(self, *_: object) -> None:
            calls.append(1)

    stored = measure_shift(PLAN, *sides, library, Unused(), 0)  # type: ignore[arg-type]
    assert not calls
    for one, other in zip(made.blocks, stored.blocks, strict=True):
        assert one.distance == pytest.approx(other.distance, abs=1e-9)


def test_too_few_documents_are_no_failure_of_the_run(base: LoadedBase) -> None:
    sets = {"few": drawn(0, 3, 90, count=5), "many": drawn(1, 3, 90)}
    library, builder = parts(base, sets)
    found = measure_shift(PLAN, ("few", sets["few"]), ("many", sets["many"]), library, builder, 0)
    assert not found.blocks
    assert "expected at least 10" in found.failed
    assert torch.is_grad_enabled()
