"""Trials that share a batch against the same trials one after another, all on a stored trunk: time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from allocations import AllocationCounter
from sweep_points import LORA_ALPHA, LORA_RANK, Sets, Task
from sweep_steps import load_our_base, stored_states
from torch.utils._pytree import tree_iter

from orchestrator.anatomy import select
from orchestrator.data import TokenizedSet
from orchestrator.train import LoadedBase
from orchestrator.train.adapters.branch import open_group
from orchestrator.train.adapters.layers import AdapterSpec
from orchestrator.train.batches import RowPlan, StepInput, to_tensors
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.loop import StackedRounds
from orchestrator.train.model.objective import Objective, objective_of
from orchestrator.train.trunk.states import TrunkStates

NUM_TRIALS = 8
SIZES = ((1, 128), (1, 256), (1, 512), (2, 512), (8, 512))
"""(rows, tokens of a row) of a micro-batch."""
ROUNDS = 3


@contextmanager
def trials(base: LoadedBase, layers: str, count: int) -> Iterator[tuple[Objective, list[TorchEngine]]]:
    """`count` trials of one policy in one batch, with an optimizer each."""
    selection = select(base.anatomy, layers, "lora", LORA_RANK, task="completion")
    specs = [AdapterSpec(selection, LORA_ALPHA, seed) for seed in range(count)]
    with open_group(base, specs) as group:
        objective = objective_of(base, group.branches[0].head(), selection.cut)
        engines = [
            TorchEngine(objective, branch.learning_parameters(), weight_decay=0.0, grad_clip=1.0) for branch in group.branches
        ]
        yield objective, engines
        for engine in engines:
            engine.close()


def take_step(objective: Objective, engines: Sequence[TorchEngine], step: StepInput) -> None:
    StackedRounds(objective, len(engines)).accumulate(step, step.num_supervised)
    for engine in engines:
        engine.step(1e-4)


def micro_batch(trunk: TrunkStates, rows: int, row_tokens: int) -> StepInput:
    """Whole documents of the set, as many as fill the rows."""
    data = trunk.data
    short = np.flatnonzero(data.lengths <= row_tokens)
    chosen, plan = short[:1], RowPlan(row_tokens, rows, pack=True)
    while len(chosen) < len(short) and len(plan.batches(data, short[: len(chosen) + 1])) == 1:
        chosen = short[: len(chosen) + 1]
    (batch,) = plan.batches(data, chosen)
    return StepInput(0, batch.num_tokens, batch.num_supervised, [to_tensors(batch, torch.device("cpu"), trunk)])


def measure_fused(task: Task, sets: Sets, num_steps: int) -> list[dict[str, Any]]:
    """For each size of a micro-batch, processor seconds that a trial's step takes alone and by trials in a batch."""
    base = load_our_base(task.base)
    layers = f"last:{max(1, base.anatomy.num_blocks // 4)}"
    trunk = stored_states(base, TokenizedSet.load(sets.train), layers)
    found = []
    for rows, row_tokens in SIZES:
        step = micro_batch(trunk, rows, row_tokens)
        widths = [width for width in (1, 2, 4, 8) if width <= NUM_TRIALS]
        seconds: dict[int, list[float]] = {width: [] for width in widths}
        for _ in range(ROUNDS):
            for width in widths:
                with trials(base, layers, width) as (objective, engines):
                    take_step(objective, engines, step)
                    for _ in range(num_steps):
                        started = time.process_time()
                        take_step(objective, engines, step)
                        seconds[width].append((time.process_time() - started) / width)
        medians = {width: statistics.median(times) for width, times in seconds.items()}
        found.append({"rows": rows, "row_tokens": row_tokens, "tokens": step.num_tokens, "trial_seconds": medians})
    return found


class RealAllocations(AllocationCounter):
    """The same count on tensors with memory."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, str(operator))
        return result


def measure_memory(task: Task, sets: Sets) -> dict[str, int]:
    """Peak bytes of a step, without the base: of fused trials, and of one with as many tokens in flight; and what one
    trial's adapter and optimizer hold."""
    base = load_our_base(task.base)
    layers = f"last:{max(1, base.anatomy.num_blocks // 4)}"
    trunk = stored_states(base, TokenizedSet.load(sets.train), layers)
    small = micro_batch(trunk, 1, 512)
    repeated = {name: torch.cat([tensor] * NUM_TRIALS) for name, tensor in small.micro_batches[0].items()}
    large = StepInput(0, small.num_tokens * NUM_TRIALS, small.num_supervised * NUM_TRIALS, [repeated])
    peaks = {}
    for name, count, step in (("fused", NUM_TRIALS, small), ("alone", 1, large)):
        with RealAllocations() as counter, trials(base, layers, count) as (objective, engines):
            take_step(objective, engines, step)
            take_step(objective, engines, step)
            peaks[name] = counter.peak_bytes
    with trials(base, layers, 1) as (_, (engine,)):
        held = sum(parameter.nbytes for parameter in engine.parameters) + 4 * 4 * engine.num_elements
    return peaks | {"held_by_a_trial": held}
