"""A candidate configuration of a gang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Offload = Literal["none", "optimizer", "parameters"]
Device = Literal["cpu", "cuda"]
Stage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Candidate:
    """A candidate configuration of a gang: everything that a rank's memory depends on besides the model."""

    device: Device
    ranks: int
    executor: Literal["torch", "deepspeed"]
    zero_stage: Stage
    offload: Offload
    checkpointing: bool
    row_tokens: int
    micro_batch_rows: int = 1

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_rows * self.row_tokens

    def __str__(self) -> str:
        """Return a short description such as `2 ranks, ZeRO-2, checkpointing`."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        parts = [ranks] if self.executor == "torch" else [ranks, f"ZeRO-{self.zero_stage}"]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [f"{self.offload} offloaded"] if self.offload != "none" else []
        return ", ".join(parts)
