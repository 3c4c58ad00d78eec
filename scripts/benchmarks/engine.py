"""Training speed of the engines on one rank against a bare PyTorch loop of the same model and batch.

    scripts/bench engine [--steps 5] [--rows 4] [--tokens 256] [--json]

Every way trains the same random Llama on the same rows, with every token supervised. A step is timed in processor
seconds of its one pinned thread, which are wall seconds on an idle machine and are not disturbed on a busy one; the
median counts. The bare loop is transformers' own forward and loss, backward, torch's AdamW on the 16-bit weights.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import build_set
from orchestrator.train import LoadedBase, Objective, load_base, open_branch
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.engines.engine import Engine
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.model.objective import final_norm_of
from orchestrator.train.ranks import Ranks
from orchestrator.work.execution import BaseLoad, ExecutionPlan, TrainSettings

GOAL = 0.9
SETTINGS = TrainSettings(warmup=0.0, schedule="constant", weight_decay=0.0, grad_clip=1.0, tokens_per_step=1)
WAYS = {"torch": None, "deepspeed ZeRO-0": 0, "deepspeed ZeRO-1": 1, "deepspeed ZeRO-2": 2}


def main() -> None:
    options = _options()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = _make_base(Path(name) / "base")
        dist.init_process_group("gloo", init_method=f"file://{name}/meeting", rank=0, world_size=1)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        rows = {tune: _measure(base, tune, options) for tune in ("lora", "full")}
        dist.destroy_process_group()
    if options.json:
        print(json.dumps({"tokens_per_s": rows, "goal": GOAL}))
        return
    print(f"{'tokens/s':<20}" + "".join(f"{tune:>20}" for tune in rows))
    for way in ("bare", *WAYS):
        cells = [f"{speeds[way]:,.0f} ({speeds[way] / speeds['bare']:.2f}x)" for speeds in rows.values()]
        print(f"{way:<20}" + "".join(f"{cell:>20}" for cell in cells))
    slowest = min(speeds[way] / speeds["bare"] for speeds in rows.values() for way in WAYS)
    print(f"slowest engine {slowest:.2f}x the bare loop, goal {GOAL}x: {'reached' if slowest >= GOAL else 'missed'}")


def _measure(base: LoadedBase, tune: str, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of every way."""
    selection = select(base.anatomy, "all", tune, 16 if tune == "lora" else None, task="completion")
    generator = np.random.default_rng(0)
    documents = [(generator.integers(3, 4000, options.tokens), np.ones(options.tokens, bool)) for _ in range(options.rows)]
    data = build_set(documents)
    (batch,) = RowPlan(options.tokens, options.rows, pack=True).batches(data, np.arange(options.rows))
    tensors = to_tensors(batch, base.device)
    seconds: dict[str, list[float]] = {way: [] for way in ("bare", *WAYS)}
    for _ in range(2):
        for way in seconds:
            with open_branch(base, selection, lora_alpha=32, seed=0) as branch:
                if way == "bare":
                    optimizer = torch.optim.AdamW([p for _, p in branch.learning_parameters()], lr=1e-4)
                    seconds[way] += _time(lambda: _bare_step(branch.model, optimizer, tensors), options.steps)  # noqa: B023
                    continue
                norm = final_norm_of(branch.model, base.anatomy)
                objective = Objective(branch.model, branch.backbone(), branch.head(), "completion", final_norm=norm)
                engine = _engine(objective, branch.learning_parameters(), WAYS[way])
                seconds[way] += _time(lambda: _engine_step(engine, tensors, batch.num_supervised), options.steps)  # noqa: B023
                engine.close()
    tokens = options.rows * options.tokens
    return {way: tokens / statistics.median(times) for way, times in seconds.items()}


def _time(step: Callable[[], object], num_steps: int) -> list[float]:
    step()
    times = []
    for _ in range(num_steps):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return times


def _bare_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    ids = tensors["input_ids"]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _engine_step(engine: Engine, tensors: dict[str, torch.Tensor], num_supervised: int) -> None:
    engine.backward(engine.loss(tensors), 1 / num_supervised)
    engine.step(1e-4)


def _engine(objective: Objective, learning: list, stage: int | None) -> Engine:
    if stage is None:
        return TorchEngine(objective, learning, weight_decay=0.0, grad_clip=1.0)
    from orchestrator.train.engines.deepspeed_engine import DeepSpeedTrainer, prepare_base

    execution = ExecutionPlan.model_validate(
        {
            "device": "cpu",
            "ranks": 1,
            "threads_per_rank": 1,
            "executor": "deepspeed",
            "zero_stage": stage,
            "row_tokens": 1,
            "micro_batch_rows": 1,
        }
    )
    prepare_base(objective.model, execution)
    return DeepSpeedTrainer(objective, learning, execution, SETTINGS, Ranks())


def _make_base(folder: Path) -> LoadedBase:
    """A random Llama of 8.7 million parameters, as the small bases of this project are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    anatomy = read_anatomy(folder, need_weights=True)
    load = BaseLoad(folder=str(folder), model_type="llama", quantize="none", task="completion")
    return load_base(load, anatomy, dtype=torch.bfloat16, device=torch.device("cpu"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each way and round; at least 5")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
