"""One training step of a LoRA trial, on our side and through PEFT: its time and its operations."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stock_trial import adapted_model
from sweep_points import LORA_ALPHA, LORA_RANK, SEED, Sets, Task
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import TokenizedSet, documents_of_steps
from orchestrator.train import LoadedBase, load_base, open_branch
from orchestrator.train.batches import RowPlan, StepPlan, step_inputs, to_tensors
from orchestrator.train.engines.engine import Engine
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.model.compiled import LOOKED_AT, TIMED, time_compiled
from orchestrator.train.model.objective import objective_of
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.train.trunk.chunks import MemoryChunks
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.measurements import CompileTimes

Batch = Mapping[str, torch.Tensor]
Step = Callable[[], object]
OURS, STOPPED, WHOLE = "ours", "PEFT, gradients stopped at the cut", "PEFT with enable_input_require_grads"
WAYS = (OURS, STOPPED, WHOLE)
TOKENS_PER_STEP = 4096
ROW_TOKENS = 512
ROUNDS = 2


def load_our_base(folder: Path) -> LoadedBase:
    anatomy = read_anatomy(folder, need_weights=True)
    load = BaseLoad(folder=str(folder), model_type=anatomy.model_type, quantize="none", task="completion")
    return load_base(load, anatomy, dtype=torch.bfloat16, device=torch.device("cpu"))


def first_step_batches(sets: Sets, base: LoadedBase | None = None, layers: str = "all") -> list[Batch]:
    """The first step's documents, packed; every side gets the same. Given a base, with the hidden states that enter `layers`."""
    data = TokenizedSet.load(sets.train)
    trunk = stored_states(base, data, layers) if base is not None and layers != "all" else None
    documents = documents_of_steps(data.offsets, TOKENS_PER_STEP, SEED, 0)[0]
    rows = RowPlan(ROW_TOKENS, TOKENS_PER_STEP // ROW_TOKENS, pack=True)
    return [to_tensors(batch, torch.device("cpu"), trunk) for batch in rows.batches(data, np.asarray(documents))]


def num_tokens(batches: Sequence[Batch]) -> int:
    """Tokens of a step, without padding."""
    return int(sum(batch["lengths"].sum() for batch in batches))


def stored_states(base: LoadedBase, data: TokenizedSet, layers: str) -> TrunkStates:
    """Return the activations entering the first of these blocks, for every document."""
    cut = select(base.anatomy, layers, "lora", LORA_RANK, task="completion").cut
    rows = RowPlan(ROW_TOKENS, TOKENS_PER_STEP // ROW_TOKENS, pack=True)
    builder = TrunkBuilder(base, objective_of(base, base.model.lm_head), rows, Ranks(), partitioned=False)
    return builder.build(data, {cut: MemoryChunks()})[cut]


def our_step(engine: Engine, batches: Sequence[Batch]) -> None:
    """One step of a trial as our gangs take it."""
    supervised = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    for batch in batches:
        engine.backward(engine.loss(batch), 1 / supervised)
    engine.step(1e-4)


@contextmanager
def our_side(base: LoadedBase, layers: str, batches: Sequence[Batch]) -> Iterator[Step]:
    selection = select(base.anatomy, layers, "lora", LORA_RANK, task="completion")
    with open_branch(base, selection, lora_alpha=LORA_ALPHA, seed=SEED) as branch:
        objective = objective_of(base, branch.head(), selection.cut)
        engine = TorchEngine(objective, branch.learning_parameters(), weight_decay=0.0, grad_clip=1.0)
        yield partial(our_step, engine, batches)
        engine.close()


def peft_step(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> None:
    """The same step through transformers' own forward and loss."""
    supervised = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    for batch in batches:
        labels = batch["labels"]
        answer = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=supervised,
            use_cache=False,
        )
        answer.loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def peft_side(base: Path, layers: str, batches: Sequence[Batch], *, input_gradients: bool) -> Iterator[Step]:
    model = adapted_model(str(base), layers)
    model.train()
    blocks = model.base_model.model.model.layers
    if input_gradients:
        model.enable_input_require_grads()
    elif layers != "all":
        blocks[len(blocks) - int(layers.removeprefix("last:"))].register_forward_pre_hook(_detach, with_kwargs=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    yield partial(peft_step, model, optimizer, batches)


def _detach(module: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
    if given:
        return (given[0].detach(), *given[1:]), named
    return given, named | {"hidden_states": named["hidden_states"].detach()}


def side(way: str, base: LoadedBase, folder: Path, layers: str, batches: Sequence[Batch]) -> AbstractContextManager[Step]:
    if way == OURS:
        return our_side(base, layers, batches)
    return peft_side(folder, layers, batches, input_gradients=way == WHOLE)


def measure_steps(task: Task, sets: Sets, num_steps: int) -> dict[str, Any]:
    """Processor seconds of a step of every way (median; of one thread, so they are wall seconds of an idle machine), and
    its operations. The layers are the last quarter of the blocks."""
    base = load_our_base(task.base)
    layers = f"last:{max(1, base.anatomy.num_blocks // 4)}"
    batches = first_step_batches(sets, base, layers)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            with side(way, base, task.base, layers, batches) as step:
                seconds[way] += _time(step, num_steps)
    operations = {way: count_flops(way, base, task.base, layers, batches) for way in WAYS}
    return {
        "layers": layers,
        "tokens": num_tokens(batches),
        "step_seconds": {way: statistics.median(times) for way, times in seconds.items()},
        "step_flops": operations,
        "times": len(seconds[OURS]),
    }


def measure_compiled(task: Task, sets: Sets) -> dict[str, CompileTimes]:
    """By layers, a full micro-batch of a trial forwards and backwards, as it is and with compiled blocks, and what compiling
    takes: processor seconds, the C++ compiler's among them."""
    base, data = load_our_base(task.base), TokenizedSet.load(sets.train)
    num_rows = TOKENS_PER_STEP // ROW_TOKENS
    rows = RowPlan(ROW_TOKENS, num_rows, pack=True, one_shape=True)
    execution = ExecutionPlan(
        device="cpu", ranks=1, threads_per_rank=1, executor="torch", row_tokens=ROW_TOKENS, micro_batch_rows=num_rows
    )
    found: dict[str, CompileTimes] = {}
    for layers in (f"last:{max(1, base.anatomy.num_blocks // 4)}", "all"):
        trunk = stored_states(base, data, layers) if layers != "all" else None
        selection = select(base.anatomy, layers, "lora", LORA_RANK, task="completion")
        with open_branch(base, selection, lora_alpha=LORA_ALPHA, seed=SEED) as branch:
            objective = objective_of(base, branch.head(), selection.cut)
            engine = TorchEngine(objective, branch.learning_parameters(), weight_decay=0.0, grad_clip=1.0)
            steps = step_inputs(StepPlan(data, TOKENS_PER_STEP, SEED), rows, 0, LOOKED_AT, trunk)
            before = _processor_seconds()
            times = time_compiled(base, engine, selection.cut, execution, steps, time.process_time)
            passes = (1 + TIMED) * (times.eager_seconds + times.compiled_seconds)
            compiling = max(0.0, _processor_seconds() - before - passes)
            found[layers] = times.model_copy(update={"compile_seconds": compiling})
            engine.close()
    return found


def _processor_seconds() -> float:
    """Return the CPU seconds of this process and of the children that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _time(step: Step, num_steps: int) -> list[float]:
    step()
    times: list[float] = []
    for _ in range(num_steps):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return times


def count_flops(way: str, base: LoadedBase, folder: Path, layers: str, batches: Sequence[Batch]) -> int:
    """Operations of one step: matrix products and attention, the head's among them."""
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _forward_formula,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_formula,
    }
    with side(way, base, folder, layers, batches) as step, FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    return counter.get_total_flops()


def _forward_formula(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward_formula(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def sweep_flops(task: Task, sets: Sets, steps_by_trial: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Operations of training so many steps of each trial (layers, steps), on our side and through PEFT.

    PEFT is given packed rows too, which its own data path does not make: the least that it could do.
    """
    base = load_our_base(task.base)
    sums: dict[str, float] = {OURS: 0.0, STOPPED: 0.0}
    for layers in {layers for layers, _ in steps_by_trial}:
        batches = first_step_batches(sets, base, layers)
        steps = sum(count for name, count in steps_by_trial if name == layers)
        for way in sums:
            sums[way] += steps * count_flops(way, base, task.base, layers, batches)
    return sums
