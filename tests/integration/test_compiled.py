"""A real sweep whose trials train with compiled blocks, and one that is submitted again and goes on so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.plan.values import RunPlan
from orchestrator.store import read_json, read_jsonl
from orchestrator.train.model.compiled import missing_compiler
from orchestrator.work.measurements import CompileChoice

from .runs import TIMEOUT_S, events_of, result_of, run_folder, submit, transfer_of, trials_of, write_spec

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3 * TIMEOUT_S),
    pytest.mark.skipif(bool(missing_compiler(torch.device("cpu"))), reason="no C++ compiler"),
]

SEARCH: dict[str, Any] = {
    "layers": ["last:1"],
    "learning_rate": {"lora": [2e-3, 2e-2]},
    "lora_rank": [4],
    "trials": 2,
    "scheduler": "none",
    "algorithm": "random",
    "max_forgetting": 10,
}
RESOURCES: dict[str, Any] = {"gangs": 1, "ranks_per_gang": 1, "compile": "on"}


def losses_of(run: Path) -> dict[str, list[str]]:
    ids = [entry.trial.trial_id for entry in trials_of(run)]
    return {name: [line["loss_hex"] for line in read_jsonl(run / "trials" / name / "steps.jsonl")] for name in ids}


def test_a_sweep_compiles_once_and_goes_on_so(tmp_path: Path, ray_here: None) -> None:
    spec = write_spec(tmp_path, "compiled", search=SEARCH, resources=RESOURCES)
    assert submit("sweep", spec) == 0
    run = run_folder(spec)
    choice = CompileChoice.model_validate(read_json(run / "compile.json"))
    assert choice.compiled
    assert choice.times is not None
    assert choice.times.compile_seconds > 0
    assert RunPlan.model_validate(read_json(run / "plan.json")).execution.compiled
    engines = [result_of(run, entry.trial.trial_id).engine for entry in trials_of(run)]
    assert [engine is not None and (engine.compiled, engine.compile_seconds) for engine in engines] == [(True, 0.0)] * 2, (
        "the measurement has compiled what they need"
    )
    assert result_of(run, "none").engine is not None
    assert transfer_of(run).verification is not None

    values = json.loads(spec.read_text())
    values["search"]["trials"], values["resources"]["compile"] = 3, "auto"
    spec.write_text(json.dumps(values))
    assert submit("sweep", spec) == 0
    assert len(events_of(run, "blocks_compiled")) == 1, "measured once"
    third = result_of(run, trials_of(run)[2].trial.trial_id).engine
    assert third is not None
    assert third.compiled

    plain = write_spec(tmp_path, "plain", search={**SEARCH, "trials": 3}, resources={**RESOURCES, "compile": "auto"})
    assert submit("sweep", plain) == 0
    assert not read_json(run_folder(plain) / "compile.json")["compiled"], "a search as short as this is not measured"
    for name, losses in losses_of(run_folder(plain)).items():
        for one, other in zip(losses, losses_of(run)[name], strict=True):
            assert float.fromhex(one) == pytest.approx(float.fromhex(other), rel=2e-2), "bfloat16"
