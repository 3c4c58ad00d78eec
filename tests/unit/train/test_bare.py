"""Trials run on a machine that has neither Ray nor DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from orchestrator.data import build_set

RUN = """
import importlib.util
import sys
from pathlib import Path

def absent(name):
    return name.partition(".")[0] in ("ray", "deepspeed")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if absent(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec  # how libraries ask whether another one is there
importlib.util.find_spec = lambda name, package=None: None if absent(name) else found(name, package)
from orchestrator.anatomy import read_anatomy, select
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.trial import TrialSpec
from orchestrator.train import TrainHost

base, data, folder = sys.argv[1:]
anatomy = read_anatomy(Path(base), need_weights=True)
execution = ExecutionPlan(
    device="cpu", ranks=1, threads_per_rank=1, executor="torch", dtype="float32", row_tokens=32, micro_batch_rows=1
)
load = BaseLoad(folder=base, model_type="llama", quantize="none", task="completion")
host = TrainHost.create(load, anatomy, execution, 0, 1, None)

def assignment(name):
    return TrainRung(
        context=WorkContext(
            settings=TrainSettings(warmup=0.0, schedule="constant", weight_decay=0.0, grad_clip=1.0, tokens_per_step=32),
            data=DataPaths(train=data, eval=data), metric="loss",
            trunk=TrunkPlan(cuts=(3,), num_bytes=0, folder=f"{folder}/cache"),
        ),
        trial=TrialSpec(
            trial_id=name, number=0, layers="last:1", tune="lora", learning_rate=1e-3, lora_rank=4, total_steps=2,
            total_tokens=64, seed=1,
        ),
        selection=select(anatomy, "last:1", "lora", 4, task="completion"), execution=execution,
        folder=f"{folder}/{name}", stop_step=2,
    )

results = host.run_group([assignment("a"), assignment("b")])
print(*(result.state for result in results), *(result.engine.trunk_cut for result in results))
"""


def test_a_group_on_a_stored_trunk_needs_neither(llama_folder: Callable[..., Path], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    build_set([(generator.integers(3, 90, size=16), np.arange(16) >= 8) for _ in range(6)]).save(tmp_path / "set.npz")
    command = [sys.executable, "-c", RUN, str(llama_folder()), str(tmp_path / "set.npz"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-4:] == ["done", "done", "3", "3"]
