"""A trial on a share of the training documents: those documents and no others, with what is stored of the trunk or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import TokenizedSet, documents_of_share
from orchestrator.store import read_jsonl
from orchestrator.work.assignment import TrainRung
from orchestrator.work.execution import TrunkPlan

from .test_host import Bench, with_data


@pytest.fixture
def bench(llama_folder: Callable[..., Path], tmp_path: Path) -> Iterator[Bench]:
    made = Bench(llama_folder(), tmp_path)
    yield made
    made.host.close()


def on_share(bench: Bench, name: str, share: float, trunk: TrunkPlan | None = None, replay: float = 0.0) -> TrainRung:
    found = bench.assignment(name, trunk=trunk)
    remedies = found.trial.remedies.model_copy(update={"replay": replay})
    trial = found.trial.model_copy(update={"control": "curve", "share": share, "remedies": remedies})
    return with_data(found.model_copy(update={"trial": trial}), replay=str(bench.folder / "eval.npz"))


def test_all_documents_are_the_trial_itself(bench: Bench) -> None:
    assert bench.run("whole").state == "done"
    assert bench.host.run_trial(on_share(bench, "share", 1.0)).state == "done"
    assert bench.bits("share") == bench.bits("whole")


@pytest.mark.parametrize("replay", [0.0, 0.3])
def test_a_share_learns_from_its_documents_alone_and_from_what_is_stored_of_them(bench: Bench, replay: float) -> None:
    trunk = TrunkPlan(cuts=(3,), num_bytes=0, folder=str(bench.folder / "trunk"), max_bytes=10**9)
    results = {
        name: bench.host.run_trial(on_share(bench, name, 0.5, stored, replay))
        for name, stored in (("plain", None), ("stored", trunk))
    }
    assert [result.engine.trunk_cut for result in results.values() if result.engine] == [None, 3]
    losses = {name: [float.fromhex(bits) for bits in bench.bits(name)] for name in results}
    assert losses["stored"] == pytest.approx(losses["plain"], rel=1e-5)

    train = TokenizedSet.load(bench.folder / "train.npz")
    chosen = train.select(documents_of_share(train, 0.5, seed=1))
    alone = bench.folder / "alone.npz"
    chosen.save(alone)
    cut_out = on_share(bench, "cut-out", 1.0, replay=replay)
    cut_out = with_data(cut_out, train=str(alone))
    assert bench.host.run(cut_out).state == "done"
    assert bench.bits("cut-out") == bench.bits("plain")
    if not replay:
        first_epoch = [line for line in read_jsonl(bench.folder / "plain" / "steps.jsonl") if line["epoch"] == 0]
        assert first_epoch[-1]["tokens"] == chosen.num_tokens == int(np.sum(chosen.lengths))
