"""The blocks from the cut up as compiled code (torch.compile), for training steps and nothing else.

A trial's numbers must depend only on the trial, not on what its gang compiled before. So there is code for one shape only,
that of a full micro-batch, padded to the width of a row: code for dynamic shapes depends on those that it met first, and
code for each would be compiled again and again. The smaller micro-batch at the end of a step runs uncompiled. Code is
kept by the kind of a block and of its trainable parameters: blocks that differ only in their numbers share it, in all trials of
a process, and inductor's cache on disk passes it to the next one.

Shapes: B rows of a micro-batch, L tokens of a row, H hidden size.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.data.batching import width_of
from orchestrator.errors import TrainingError
from orchestrator.train.batches import StepInput
from orchestrator.train.engines.engine import Engine
from orchestrator.train.model.attention import leave_uncompiled
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.trunk.library import default_folder
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.measurements import CompileTimes

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CODE_KINDS = 10_000
"""Upper bound on the kinds of code that a process keeps. Beyond torch's own limit of 8 it silently runs uncompiled, with other
bits."""
TIMED = 3
LOOKED_AT = 8
"""Steps by which full micro-batches are judged: what they hold of all tokens, and how fast they are."""


class CompileError(TrainingError):
    """The blocks cannot be compiled; `why` is only the reason."""

    def __init__(self, why: str, *, remedy: str) -> None:
        super().__init__(f"the blocks cannot be compiled: {why}", remedy=remedy)
        self.why = why


@dataclass
class Spent:
    """Seconds spent on compiling; known when the context ends."""

    seconds: float = 0.0


@contextmanager
def compiled_blocks(base: LoadedBase, cut: int, execution: ExecutionPlan) -> Iterator[Spent]:
    """Run full micro-batches through compiled blocks in this context, if the plan says so.

    Every block is restored afterwards. Hooks, gradient checkpointing and the attention over packed documents, whose lengths
    differ in every row, stay outside the compiled code.

    Args:
        base: With its branch open.
        cut: The first block that is compiled.
        execution: How the trial is trained.

    Raises:
        CompileError: the blocks cannot be compiled.
    """
    spent = Spent()
    if not execution.compiled:
        yield spent
        return
    missing = missing_compiler(base.device)
    if missing:
        raise CompileError(missing, remedy="install one, or set resources.compile: off")
    dynamo = _prepared()
    shape = (execution.micro_batch_rows, width_of(execution.row_tokens))
    before = _seconds_compiling()
    with ExitStack() as stack:
        stack.enter_context(
            dynamo.config.patch(
                # suppress_errors: a failed compilation would run uncompiled in silence, with other last bits than the other
                # trials.
                recompile_limit=CODE_KINDS,
                accumulated_recompile_limit=CODE_KINDS,
                specialize_float=True,
                suppress_errors=False,
            )
        )
        for block in list(base.model.get_submodule(base.anatomy.blocks_module).children())[cut:]:
            if "forward" in vars(block):
                raise CompileError(f"a {type(block).__name__} is recomputed otherwise", remedy="resources.compile: off")
            # On the object and not on its class: hooks, which run in `__call__`, stay around it.
            vars(block)["forward"] = _forward_of(block, shape)
            stack.callback(vars(block).pop, "forward")
        try:
            yield spent
        except dynamo.exc.TorchDynamoException as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CompileError(lines[0], remedy="resources.compile: off") from error
        finally:
            spent.seconds = _seconds_compiling() - before


def missing_compiler(device: torch.device) -> str:
    """Return what is missing to compile for a device; empty if nothing is known to be."""
    if device.type == "cpu":
        names = [os.environ.get("CXX", "g++")]
        return "" if shutil.which(names[0]) else f"there is no C++ compiler ({names[0]})"
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
    return "" if any(map(shutil.which, names)) else f"there is no C compiler ({', '.join(names)})"


def time_compiled(
    base: LoadedBase,
    engine: Engine,
    cut: int,
    execution: ExecutionPlan,
    steps: Iterable[StepInput],
    clock: Callable[[], float] = time.perf_counter,
) -> CompileTimes:
    """Time the forward and backward pass of a full micro-batch, eager and then padded and compiled. The engine takes no step.

    Args:
        base: With its branch open.
        engine: The branch's engine.
        cut: The first block that is compiled.
        execution: How the trial is trained.
        steps: The trial's first LOOKED_AT steps, whose full micro-batches have one shape.
        clock: The clock that times micro-batches; torch times compiling itself.
    """
    rows = execution.micro_batch_rows
    batches = [batch for step in steps for batch in step.micro_batches]
    full = [batch for batch in batches if len(batch["input_ids"]) == rows]
    if not full:
        return CompileTimes(failed=f"no micro-batch of the first {LOOKED_AT} steps has {rows} rows")
    full_share = sum(map(_num_tokens, full)) / sum(map(_num_tokens, batches))
    engine.objective.train()
    try:
        with compiled_blocks(base, cut, execution.model_copy(update={"compiled": True})) as spent:
            compiled = _fastest(engine, full[0], base.device, clock)
    except CompileError as error:
        return CompileTimes(failed=error.why)
    except TrainingError as error:
        return CompileTimes(failed=error.what)
    eager = _fastest(engine, _without_padding(full[0]), base.device, clock)
    return CompileTimes(eager_seconds=eager, compiled_seconds=compiled, compile_seconds=spent.seconds, full_share=full_share)


def _num_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    return int(batch["lengths"].sum())


def _without_padding(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut the micro-batch to the width of its longest row."""
    width = width_of(int(batch["lengths"].max()))
    return {name: tensor[:, :width].contiguous() if tensor.ndim > 1 else tensor for name, tensor in batch.items()}


def _fastest(engine: Engine, batch: Mapping[str, torch.Tensor], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of a few forward and backward passes, after one to warm up."""
    times: list[float] = []
    for _ in range(1 + TIMED):
        started = clock()
        loss = engine.loss({name: tensor.to(device) for name, tensor in batch.items()})
        engine.backward(loss, 1.0)
        loss.item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - started)
    # The fastest pass is the one that other processes disturbed least.
    return min(times[1:])


def _forward_of(block: nn.Module, shape: tuple[int, int]) -> Callable[..., Any]:
    """Return a block's forward pass: compiled for hidden states [B, L, H] of this (B, L), its own for others."""
    own = type(block).forward
    checkpointing: Any = block if isinstance(block, GradientCheckpointingLayer) else None
    code = _code(getattr(own, "__wrapped__", own) if checkpointing is not None else own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        # The last micro-batch of a step, and evaluation: other shapes would each be compiled again.
        if tuple(states.shape[:2]) != shape:
            return own(block, *args, **kwargs)
        if checkpointing is not None and checkpointing.gradient_checkpointing:
            return checkpointing._gradient_checkpointing_func(partial(code, block, **kwargs), *args)
        return code(block, *args, **kwargs)

    return forward


@cache
def _code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled form of a class's forward pass.

    Autotuning is off: kernels chosen by timing on the device may differ in another process, and with them the last bits of the
    losses.
    """
    return torch.compile(forward, dynamic=False, options={"deterministic": True})


@cache
def _prepared() -> Any:
    """Set up torch's compiler once per process: its cache folder, and no worker processes besides the gang's."""
    folders = import_module("torch._inductor.runtime.cache_dir_utils")
    if os.environ.get(CACHE_VARIABLE, folders.default_cache_dir()) == folders.default_cache_dir():  # torch sets it too
        os.environ[CACHE_VARIABLE] = str(default_folder().with_name("inductor"))
    # By default each rank would start a pool of compiling processes, on cores that the other ranks use.
    import_module("torch._inductor.config").compile_threads = 1  # type: ignore[attr-defined]
    leave_uncompiled()
    return import_module("torch._dynamo")


def _seconds_compiling() -> float:
    """Return the seconds this process has spent compiling forward and backward passes."""
    return import_module("torch._dynamo.utils").calculate_time_spent()["total_wall_time"]
