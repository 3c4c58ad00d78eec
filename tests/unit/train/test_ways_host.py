"""A rank of a gang on a class that does not pack: rows of one document, stored states, trials in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.work.assignment import TrainRung
from orchestrator.work.execution import TrunkPlan
from orchestrator.work.results import RungResult

from .small_bases import small_folder
from .test_host import Bench


@pytest.mark.parametrize("model_type", ["bloom"])
def test_trials_on_a_class_that_does_not_pack(tmp_path: Path, model_type: str) -> None:
    folder = small_folder(tmp_path / "base", model_type)
    bench = Bench(folder, tmp_path)
    try:
        assert not bench.anatomy.ways.packs
        trunk = TrunkPlan(cuts=(2,), num_bytes=0, folder=str(tmp_path / "cache"), max_bytes=10**9)
        plain = bench.run("plain")
        assert plain.state == "done", plain.reason
        assert plain.engine is not None
        assert "self-test of the base: the head path, padding" in plain.engine.base_test
        assert bench.run("stored", trunk=trunk).state == "done"
        losses = [[float.fromhex(bits) for bits in bench.bits(name)] for name in ("plain", "stored")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        group: list[TrainRung] = [bench.assignment(name, trunk=trunk, rate=rate) for name, rate in (("a", 1e-2), ("b", 2e-2))]
        results = bench.host.run_group([*group])
        bench.host.settle()
        assert [result.state for result in results if isinstance(result, RungResult)] == ["done", "done"]
        assert bench.bits("a") == bench.bits("stored")
        assert bench.bits("b") != bench.bits("a")
        assert bench.run("full", policy="all+head", tune="full").state == "done"
        assert bench.run("none", policy="none", control="none", stop=0).state == "done"
    finally:
        bench.host.close()
