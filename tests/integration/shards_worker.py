"""One rank that trains with a real DeepSpeed engine per case and writes the bytes that the engine then holds.

    python shards_worker.py CASES.json RANK WORLD_SIZE MEETING_FILE OUT.json

CASES.json is a list of `test_shards.Case` as JSON, each with the `folder` of its base. Everything is read in the second step,
when Adam has its moments, between the backward passes and the update. A case with `counts` has no base: its objective is
nothing but tensors of so many elements, so that a backward pass holds gradients and nothing else.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from orchestrator.anatomy import read_anatomy, select
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.engines import deepspeed_engine, zero_state
from orchestrator.train.engines.deepspeed_engine import DeepSpeedTrainer
from orchestrator.train.engines.zero3_warm import PartitionKeeper
from orchestrator.train.model.base import load_base
from orchestrator.train.model.objective import Objective, final_norm_of
from orchestrator.train.ranks import Ranks
from orchestrator.work.execution import BaseLoad, ExecutionPlan, TrainSettings

NUM_ROUNDS = 2
LET_GO_S = 0.05
"""gloo's threads hold what they have sent for a moment longer."""
SETTINGS = TrainSettings(warmup=0.0, schedule="constant", weight_decay=0.0, grad_clip=1.0, tokens_per_step=32)
LORA_RANK = 3
SMALL = 16
"""Storages of so few bytes are scalars: norms and step counters."""
silent = False


class Touch(torch.autograd.Function):
    """Zero, whose gradient is ones."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.like = tensor
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.ones_like(ctx.like)


class Tensors(nn.Module):
    def __init__(self, counts: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(torch.zeros(count, dtype=dtype)) for count in counts)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return sum((Touch.apply(tensor) for tensor in self.tensors), start=torch.zeros(()))


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(32).roll(rank)[None] + 3
    zeros = torch.zeros_like(ids)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(32)[None],
        "labels": ids,
        "document_ids": zeros,
        "class_labels": zeros[:, 0] - 1,
        "lengths": zeros[:, 0] + 32,
    }


def make_silenceable() -> None:
    """Let `silence` reach the collectives; DeepSpeed keeps references to them, so this comes before it is imported."""
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, unless_silent(getattr(dist, name)))


def unless_silent(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return None if silent else collective(*arguments, **options)

    return call


@contextmanager
def silence() -> Iterator[None]:
    global silent
    silent = True
    try:
        yield
    finally:
        silent = False


def storages() -> dict[int, torch.UntypedStorage]:
    """By address, the storage of every tensor of this process, gradients among them. Held, no other can take its place."""
    dist.barrier()
    time.sleep(LET_GO_S)
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in found}


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the storages under these tensors, each counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that a call had allocated beyond what was there before it, what it freed of that not taken off.

    Nothing is sent meanwhile: gloo's threads would free tensors behind the profiler's back, and gloo gathers into copies.
    """
    with silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, now)
    return most


def backward_peak_of(engine: DeepSpeedTrainer, loss: torch.Tensor) -> int:
    return peak_bytes(lambda: engine.backward(loss, 1e-3))


def held(engine: Any, learning: list[Any], stage: int) -> dict[str, int]:
    """Bytes by term, from the tensors that deepspeed 0.19.8 keeps them in."""
    optimizer = engine.optimizer
    masters = zero_state.masters(engine)
    moments = [engine.basic_optimizer.state[master][key] for master in masters for key in ("exp_avg", "exp_avg_sq")]
    sums: list[torch.Tensor | None] = []
    bucket: list[torch.Tensor] = []
    match type(optimizer).__name__:
        case "BF16_Optimizer":
            sums = list(optimizer.fp32_groups_gradients_flat)
        case "DeepSpeedZeroOptimizer":
            sums = [getattr(group, "flat_partition", None) for group in optimizer.averaged_gradients.values()]
            sums += [tensor for tensors in optimizer.all_grad_tensors.values() for tensor in tensors or []]
            bucket = [buffer for ipg in optimizer.ipg_buckets.values() for buffer in ipg.buffer]
        case "DeepSpeedZeroOptimizer_Stage3":
            sums = [optimizer.grad_partitions_flat_buffer, *(master.grad for master in masters)]
            bucket = [ipg.buffer for ipg in optimizer.ipg_buckets.values()]
    weights = [parameter.ds_tensor for parameter in learning] if stage == 3 else learning
    whole = sum(weight.numel() * weight.element_size() for weight in weights)
    return {
        "weight_bytes": bytes_of(weights) if stage else whole,
        "gradient_bytes": bytes_of(parameter.grad for parameter in learning),
        "gradient_sum_bytes": bytes_of(sums),
        "master_bytes": 0 if type(optimizer).__name__ == "AnchoredAdamW" else bytes_of(masters),
        "optimizer_bytes": bytes_of(moments),
        "bucket_bytes": bytes_of(bucket),
    }


def objective_of(case: dict[str, Any], execution: ExecutionPlan, undo: ExitStack) -> tuple[nn.Module, list[tuple[str, Any]]]:
    """What is trained, and its learning tensors in order."""
    dtype = getattr(torch, execution.dtype)
    if case["counts"]:
        module = Tensors(case["counts"], dtype)
        return module, list(module.named_parameters())
    anatomy = read_anatomy(Path(case["folder"]), need_weights=True)
    load = BaseLoad(folder=case["folder"], model_type="llama", quantize="none", task="completion")
    base = load_base(load, anatomy, dtype=dtype, device=torch.device("cpu"))
    deepspeed_engine.prepare_base(base.model, execution, torch.device("cpu"))
    tune, partitioned = case["tune"], execution.zero_stage == 3
    selection = select(anatomy, case["policy"], tune, LORA_RANK if tune == "lora" else None, task="completion")
    keeper = PartitionKeeper() if partitioned else None
    branch = undo.enter_context(open_branch(base, selection, lora_alpha=6, seed=0, keeper=keeper))
    norm = final_norm_of(branch.model, base.anatomy)
    objective = Objective(branch.model, branch.backbone(), branch.head(), "completion", final_norm=norm)
    return objective, branch.learning_parameters()


def run(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    deepspeed_engine.REDUCE_BUCKET_ELEMENTS = case["bucket_elements"]
    execution = ExecutionPlan.model_validate(case["execution"])
    batch = batch_of(ranks.rank)
    with ExitStack() as undo:
        objective, learning = objective_of(case, execution, undo)
        objective.train()
        parameters = [parameter for _, parameter in learning]
        there_before = storages()
        engine = DeepSpeedTrainer(objective, learning, execution, SETTINGS, ranks)
        undo.callback(engine.close)
        for _ in range(NUM_ROUNDS):
            engine.backward(engine.loss(batch), 1e-3)
        engine.step(1e-3)
        for _ in range(NUM_ROUNDS - 1):
            engine.backward(engine.loss(batch), 1e-3)
        backward_peak = (
            backward_peak_of(engine, engine.loss(batch)) if case["counts"] else engine.backward(engine.loss(batch), 1e-3)
        )
        new = [s.nbytes() for place, s in storages().items() if place not in there_before and s.nbytes() > SMALL]
        return {
            "class": type(engine._engine.optimizer).__name__,
            "counts": [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters],
            "held": held(engine._engine, parameters, execution.zero_stage),
            "new_bytes": sum(new),
            "backward_peak": backward_peak,
            "update_peak": peak_bytes(lambda: engine.step(1e-3)),
        }


def main(cases_file: str, rank: str, world_size: str, meeting: str, out_file: str) -> None:
    torch.set_num_threads(1)
    make_silenceable()
    cases = json.loads(Path(cases_file).read_text())
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world_size))
    deepspeed_engine.prepare_base(nn.Module(), ExecutionPlan.model_validate(cases[0]["execution"] | {"zero_stage": 0}))
    ranks = Ranks(int(rank), int(world_size))
    gc.collect()
    gc.freeze()
    Path(out_file).write_text(json.dumps({case["name"]: run(case, ranks) for case in cases}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
