"""One rank on a GPU learns what one on a CPU learns, whichever engine carries it and wherever its state lies.

Every way runs in a process of its own, since DeepSpeed settles on a device once a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import build_set
from orchestrator.plan.memory.transient import LOGIT_CHUNK_BYTES
from orchestrator.samples import SAMPLE_BASE
from orchestrator.store import read_jsonl
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

WORKER = Path(__file__).parent.parent / "integration" / "ranks_worker.py"
STEPS = 6
TOLERANCE = 2e-2
"""Of a loss. A bf16 number has 8 significant bits, and the two devices add up in another order."""
WAYS: dict[str, dict[str, Any]] = {
    "torch": {},
    "zero-2": {"executor": "deepspeed", "zero_stage": 2},
    "zero-3, optimizer offloaded": {"executor": "deepspeed", "zero_stage": 3, "offload": "optimizer"},
    "zero-3, parameters offloaded": {"executor": "deepspeed", "zero_stage": 3, "offload": "parameters"},
}


def execution(device: str, **way: Any) -> ExecutionPlan:
    values = {"device": device, "ranks": 1, "threads_per_rank": 1, "executor": "torch", "dtype": "bfloat16"}
    backend = "nccl" if device == "cuda" else "gloo"
    return ExecutionPlan.model_validate({**values, "backend": backend, "row_tokens": 64, "micro_batch_rows": 2, **way})


def job(folder: Path, quantize: str, plan: ExecutionPlan) -> dict[str, Any]:
    """A host of the sample base with one LoRA trial on `folder`'s sets, as `ranks_worker.py` reads it."""
    anatomy = read_anatomy(SAMPLE_BASE, need_weights=True)
    base = {"folder": str(SAMPLE_BASE), "model_type": anatomy.model_type, "quantize": quantize, "task": "completion"}
    trial = {"trial_id": "trial", "number": 0, "layers": "last:2", "tune": "lora", "learning_rate": 5e-3, "lora_rank": 8}
    assignment = TrainRung(
        context=WorkContext(
            settings=TrainSettings(warmup=0.1, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=256),
            data=DataPaths(train=str(folder / "train.npz"), eval=str(folder / "eval.npz")),
            metric="loss",
        ),
        trial=TrialSpec.model_validate({**trial, "total_steps": STEPS, "total_tokens": 256 * STEPS, "seed": 1}),
        selection=select(anatomy, "last:2", "lora", 8, task="completion"),
        execution=plan,
        folder=str(folder / "trial"),
        rung=0,
        stop_step=STEPS,
    )
    parts = {"base": BaseLoad.model_validate(base), "anatomy": anatomy, "execution": plan}
    values = {name: part.model_dump(mode="json") for name, part in parts.items()}
    return {**values, "assignments": [assignment.model_dump(mode="json")], "chunk_bytes": LOGIT_CHUNK_BYTES}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[RungResult, list[float]]]:
    """(quantize, device, way) -> the trial's result and the losses of its steps."""

    def run(quantize: str, device: str, **way: Any) -> tuple[RungResult, list[float]]:
        folder = tmp_path_factory.mktemp("run")
        generator = np.random.default_rng(0)
        for name, count in (("train", 48), ("eval", 8)):
            starts, lengths = generator.integers(0, 200, count), generator.integers(20, 60, count)
            documents = [(start + np.arange(n) + 3, np.arange(n) >= n // 2) for start, n in zip(starts, lengths, strict=True)]
            build_set(documents).save(folder / f"{name}.npz")
        jobs, out = folder / "jobs.json", folder / "out.json"
        jobs.write_text(json.dumps([job(folder, quantize, execution(device, **way))]))
        command = [sys.executable, str(WORKER), str(jobs), "0", "1", str(folder / "meeting"), str(out)]
        hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (answer,) = json.loads(out.read_text()).values()
        return RungResult.model_validate(answer), [line["loss"] for line in read_jsonl(folder / "trial" / "steps.jsonl")]

    return run


@pytest.fixture(scope="module")
def on_cpu(train: Any) -> dict[str, tuple[RungResult, list[float]]]:
    return {quantize: train(quantize, "cpu") for quantize in ("none", "nf4")}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_learns_what_a_cpu_learns(train: Any, on_cpu: Any, way: str, quantize: str) -> None:
    (result, losses), (expected, reference) = train(quantize, "cuda", **WAYS[way]), on_cpu[quantize]
    assert result.state == "done", result.reason
    assert len(losses) == len(reference) == STEPS
    np.testing.assert_allclose(losses, reference, rtol=TOLERANCE)
    assert result.eval_loss == pytest.approx(expected.eval_loss, rel=TOLERANCE)
    assert reference[-1] < reference[0] * (1 - 5 * TOLERANCE), "a trial that does not learn proves nothing"
    assert result.engine is not None
    assert (result.engine.executor, result.engine.zero_stage) == (
        WAYS[way].get("executor", "torch"),
        WAYS[way].get("zero_stage", 0),
    )
