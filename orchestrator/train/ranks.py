"""The processes that train together, and the few things they say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


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
        """Element-wise sums over the ranks, in float64; every rank gets the same bits."""
        if self.count == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        if self.count == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, by rank, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()
