"""A sweep with stored trunks and shared batches chooses what the same sweep without them chooses, on real data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .runs import TIMEOUT_S, run_folder, submit, sweep_of, trials_of, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(4 * TIMEOUT_S)]

POINTS = [
    {"layers": layers, "lora_rank": 8, "learning_rate": rate}
    for layers in ("last:1", "last:2", "last:4", "all")
    for rate in (3e-4, 4e-3)
]
OFF = {"cache_bytes": 0, "max_fused": 1}
"""Nothing stored, no batch shared."""


def run(folder: Path, real_data: Path, name: str, resources: dict[str, Any]) -> Path:
    source = (real_data / "data" / "gsm8k" / "train.jsonl").read_text().splitlines(keepends=True)[:220]
    spec = write_spec(
        folder,
        name,
        base={"model": str(real_data / "models" / "english-7m")},
        data={
            "train": "gsm8k.jsonl",
            "eval": 0.1,
            "test": 0.1,
            "retain": None,
            "columns": {"prompt": "question", "completion": "answer"},
            "max_tokens": 512,
        },
        train={"epochs": 1, "tokens_per_step": 1024},
        search={"algorithm": "fixed", "points": POINTS, "scheduler": "none", "trials": len(POINTS), "probe": False},
        resources={"gangs": 2, "ranks_per_gang": 1, **resources},
    )
    (spec.parent / "gsm8k.jsonl").write_text("".join(source))
    assert submit("sweep", spec) == 0
    return run_folder(spec)


def test_the_same_winner_and_the_same_losses(tmp_path: Path, real_data: Path, ray_here: None) -> None:
    on = run(tmp_path / "on", real_data, "everything-on", {})
    off = run(tmp_path / "off", real_data, "everything-off", OFF)
    first, second = ({entry.trial.trial_id: entry.results[-1] for entry in trials_of(folder)} for folder in (on, off))
    assert first.keys() == second.keys()
    assert sweep_of(on).winner_id == sweep_of(off).winner_id is not None
    cuts = {result.engine.trunk_cut for result in first.values() if result.engine is not None}
    assert cuts == {None, 4, 6, 7}
    assert {result.engine.trunk_cut for result in second.values() if result.engine is not None} == {None}
    for trial, result in first.items():
        assert result.eval_loss == pytest.approx(second[trial].eval_loss, rel=2e-3)  # bf16, in another order
