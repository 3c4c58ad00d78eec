"""The interface of an engine, whichever library does the work.

An engine owns the training state while a trial runs: the 16-bit weights in the model, their fp32 master weights, the gradients
and Adam's moments. Both engines keep the same arithmetic, so that their losses agree: gradients
summed over rounds in float32, one global norm, decoupled weight decay (Loshchilov and Hutter 2019) on every trainable tensor,
and the update applied to the master weights and rounded into the model.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from orchestrator.errors import NonFiniteLossError
from orchestrator.train.anchors import Anchor
from orchestrator.work.execution import ExecutionPlan

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8

_live_parts: dict[str, weakref.WeakSet[Any]] = {}


class Engine(Protocol):
    """One trial's optimizer around one objective.

    Calls come in the order `loss`, `backward` (any number of rounds), `step`; every rank makes the same calls.
    """

    name: str
    """The classes that do the update, for the record."""
    objective: nn.Module
    """The loss module; evaluation calls it directly."""
    communicates_in_backward: bool
    """True if the rounds contain collectives, so that a rank that fails in one leaves the others waiting."""

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the token losses of this rank's micro-batch: a float32 scalar with a gradient."""
        ...

    def backward(self, loss_sum: torch.Tensor, scale: float) -> None:
        """Add the gradient of `loss_sum * scale`. Over all ranks and rounds of a step the gradients are *summed*."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, forget the gradients; returns the gradient norm before clipping.

        Raises:
            NonFiniteLossError: on every rank, when the norm is not finite; no weight was changed.
        """
        ...

    def full_tensors(self) -> dict[str, torch.Tensor]:
        """Return the trainable tensors by parameter name, complete and on the CPU. Rank 0's are filled, others may be empty."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return this rank's master weights and Adam moments: all that `load_state_dict` needs to continue bit-identically."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore `state` and round the master weights into the model."""
        ...

    def set_anchor(self, anchor: Anchor) -> None:
        """Set the anchor, which pulls the weights after every update."""
        ...

    def refresh_masters(self) -> None:
        """Set the master weights to the current values of the model's trainable tensors."""
        ...

    def anchored_masters(self) -> list[torch.Tensor]:
        """Return this rank's master weights of tensors that have a value in the base: float32, flat."""
        ...

    def squared_gradients(self) -> list[torch.Tensor]:
        """Return the sums of squared gradients of a measuring engine, shaped as `anchored_masters`."""
        ...

    @property
    def state_bytes(self) -> int:
        """Return the bytes of master weights and moments on this rank."""
        ...

    def close(self) -> None:
        """Release the model. The trainable tensors keep their values; the branch restores the base."""
        ...


FLAT = "flat"
"""The layout of master weights and moments that every rank holds completely and identically."""


def layout_of(execution: ExecutionPlan) -> str:
    """Return the layout of a state dictionary: only an engine of the same layout can restore it, with the same number of ranks
    unless it is FLAT."""
    return FLAT if execution.executor == "torch" else f"zero-{execution.zero_stage} {execution.dtype}"


def is_partitioned(execution: ExecutionPlan) -> bool:
    """Return whether ZeRO-3 has partitioned the base."""
    return execution.executor == "deepspeed" and execution.zero_stage == 3


def register_engine(*parts: Any) -> None:
    """Count an engine, and each further part that it must not leave behind, until they are garbage-collected."""
    for part in parts:
        _live_parts.setdefault(type(part).__name__, weakref.WeakSet()).add(part)


def num_live_engines() -> int:
    """Return the number of engines (or orphaned parts) that this process still holds: more than 1 while a trial runs is a
    leak."""
    # Engines are in reference cycles: without a collection a closed one would still be counted.
    gc.collect()
    return max((len(parts) for parts in _live_parts.values()), default=0)


def check_norm(norm: float) -> float:
    """Return `norm`; raise NonFiniteLossError if the gradient became NaN or infinite."""
    if norm != norm or norm in (float("inf"), float("-inf")):
        raise NonFiniteLossError(f"the gradient norm became {norm}", expected="a finite number", remedy="lower the learning rate")
    return norm
