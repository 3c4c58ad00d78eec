"""The processes that train together, and their few collectives."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from orchestrator.errors import TrainingError
from orchestrator.work.execution import ExecutionPlan


@dataclass(frozen=True)
class Ranks:
    """This process among `count` others. With one process nothing is sent and no process group is needed."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return element-wise sums over the ranks, in float64; every rank gets the same bits.

        They are added in the order of the ranks: a number's sum does not depend on the others in the list.
        """
        if self.count == 1:
            return [float(number) for number in numbers]
        own = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        # Gathered and not reduced: the order of a reduction depends on the backend and on the length of the tensor.
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return [sum(column) for column in zip(*(part.tolist() for part in parts), strict=True)]

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over the ranks in place; every rank gets the same bits."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable `value` on every rank."""
        if self.count == 1:
            return value
        holder = [value]
        # NCCL sends tensors of its own device only.
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def gather(self, value: Any) -> list[Any]:
        """Gather every rank's picklable `value`, by rank, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()


ALONE = Ranks()
"""One process, on the CPU."""


def join_gang(execution: ExecutionPlan, rank: int, world_size: int, init_method: str | None) -> Ranks:
    """Join the gang as one of its ranks: set device and threads, and join the process group if there is one.

    Args:
        execution: The execution of trials here; its `ranks` is `world_size`.
        rank: This process's number.
        world_size: Processes of the gang.
        init_method: Where the ranks meet: `tcp://host:port` or `file:///path`; None where a process group exists.

    Raises:
        TrainingError: the plan and the gang differ in their number of ranks, or there is no GPU.
    """
    if execution.ranks != world_size:
        raise TrainingError(f"the plan has {execution.ranks} ranks and the gang {world_size}")
    torch.set_num_threads(execution.threads_per_rank)
    # Only a warning where an operation has no deterministic form: such a base still trains.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode would fill every new tensor with NaN, which takes time and which nothing here reads.
    import_module("torch.utils.deterministic").fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = _device(execution)
    if world_size > 1 or execution.executor == "deepspeed":
        _join(execution, rank, world_size, init_method)
    return Ranks(rank, world_size, device)


def leave_gang() -> None:
    """Leave the process group, if there is one, and end its threads: a thread that lives on may release a tensor while Python
    shuts down, which aborts the process."""
    if not dist.is_initialized():
        return
    comm: Any = sys.modules.get("deepspeed.comm")  # DeepSpeed holds groups of its own once it is initialized
    (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()
    gc.collect()  # an engine that has ended may hold a group in a cycle


def _device(execution: ExecutionPlan) -> torch.device:
    """Return this process's GPU (the one it sees, or its LOCAL_RANK's), or the CPU."""
    if execution.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("the plan trains on GPUs and this process sees none")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic matrix products
    # An actor sees only its own GPU; a worker of Ray Train may see all GPUs of its node.
    index = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _join(execution: ExecutionPlan, rank: int, world_size: int, init_method: str | None) -> None:
    """Make the process group if there is none, and set the variables that DeepSpeed reads from the environment."""
    place = urlparse(init_method or "")
    defaults = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": place.hostname or "127.0.0.1",
        "MASTER_PORT": str(place.port or 29500),
    }
    for name, value in defaults.items():
        # Ray Train has set these in its workers; a gang's actors have only what is set here.
        os.environ.setdefault(name, value)
    if not dist.is_initialized():
        dist.init_process_group(execution.backend, init_method=init_method, rank=rank, world_size=world_size)
