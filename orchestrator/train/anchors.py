"""Anchors, which pull the weights back to the base during training.

An anchor is a penalty on the distance from the base. Its gradient is not given to Adam, which divides every gradient by its own
magnitude and would turn a large penalty into the same step as a small one. It is decoupled, after Adam's update, as weight
decay is in AdamW (Loshchilov and Hutter 2019), and solved exactly (a proximal step: Parikh and Boyd 2014, section 1.1), so that
it is stable at any strength: with a very large one the weights do not move.

Shapes: r is LoRA's rank, a matrix is [out, in]. "Masters" are the float32 master weights: this rank's part of the trainable
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from orchestrator.spec.anchors import AnchorKind

CHUNK = 2**20
"""Elements that are pulled at once: this bounds the size of the temporary tensors."""


class Anchor(Protocol):
    """Called by an engine after each update, before the master weights are rounded into the model."""

    def pull(self, master: torch.Tensor, learning_rate: float) -> None:
        """Pull the weights of one master tensor towards the base, in place.

        Args:
            master: One of the master weights that the anchor was created with.
            learning_rate: The learning rate that this step updated the master with.
        """
        ...


@dataclass(frozen=True)
class Anchored:
    """The inputs of an anchor: an engine's master weights, still equal to the base, and their measured importances."""

    strength: float
    masters: Callable[[], Sequence[torch.Tensor]]
    """The master weights that have a value in the base."""
    adapters: Callable[[], Mapping[int, Sequence[tuple[torch.Tensor, torch.Tensor]]]] | None
    """(A, B) of every adapter by the id of its master; None for an engine that partitions them."""
    adapter_scale: float
    """Scale of an adapter's product in the model."""
    lora_rank: int
    importances: Sequence[torch.Tensor] | None
    """Fisher information of each master; None for an anchor that does not use it."""


class ElementAnchor:
    """Pulls each weight w towards its value w0 in the base: to the minimum of f/2 (w - w0)^2 + (w - v)^2 / (2 r), where v is the
    weight after Adam's update and r the learning rate.

    With f = strength this is L2-SP (Xuhong et al. 2018). With f = strength x the weight's Fisher information on the retention
    set, divided by its mean over all trainable weights, it is EWC (Kirkpatrick et al. 2017); the division gives a strength the
    same meaning for both.
    """

    def __init__(
        self, masters: Sequence[torch.Tensor], strength: float, importances: Sequence[torch.Tensor] | None = None
    ) -> None:
        """
        Args:
            masters: The master weights, while they hold the base's values; a copy is kept.
            strength: At least 0.
            importances: float32, in the shape of each master; without them all are 1.
        """
        self._strength = strength
        self._starts = {id(master): master.detach().clone() for master in masters}
        self._importances = {
            id(master): each.to(master.device) for master, each in zip(masters, importances or (), strict=importances is not None)
        }

    @classmethod
    def of(cls, anchored: Anchored) -> ElementAnchor:
        return cls(anchored.masters(), anchored.strength, anchored.importances)

    @torch.no_grad()
    def pull(self, master: torch.Tensor, learning_rate: float) -> None:
        start, reach = self._starts.get(id(master)), learning_rate * self._strength
        if start is None:  # a new tensor, which has no value in the base
            return
        importance = self._importances.get(id(master))
        if importance is None:
            # The minimum of |w - v|^2 / 2 + reach |w - start|^2 / 2 over w, from v: the proximal step.
            master.lerp_(start, reach / (1.0 + reach))
            return
        # In pieces: for all weights at once, the temporary tensor would be as large as the master weights.
        pieces = (whole.view(-1).split(CHUNK) for whole in (master, start, importance))
        for part, to, each in zip(*pieces, strict=True):
            share = each * reach
            part.lerp_(to, share.div_(1.0 + share))


class ProductAnchor:
    """Pulls the product of each adapter towards zero: penalty strength/2 |s B A|^2, of A[r, in], B[out, r] and LoRA's scale s.

    The norm is a trace of two [r, r] Gram matrices, tr(B'B AA'), and the exact step in one factor, with the other one fixed, uses
    them too: A <- (I + c B'B)^-1 A, then B <- B (I + c AA')^-1, with c = rate x strength x s^2. Nothing of the size of the
    product is made.
    """

    def __init__(
        self, adapters: Mapping[int, Sequence[tuple[torch.Tensor, torch.Tensor]]], strength: float, scale: float
    ) -> None:
        """
        Args:
            adapters: (A, B) of every adapter as views of the masters, by the id of the master that they lie in.
            strength: At least 0.
            scale: Factor of the product in the model.
        """
        self._adapters = adapters
        self._strength = strength * scale**2

    @classmethod
    def of(cls, anchored: Anchored) -> ProductAnchor:
        assert anchored.adapters is not None, "the plan leaves out engines that partition adapters"
        by_expert = {
            master: [each for a, b in pairs for each in _by_expert(a, b, anchored.lora_rank)]
            for master, pairs in anchored.adapters().items()
        }
        return cls(by_expert, anchored.strength, anchored.adapter_scale)

    @torch.no_grad()
    def pull(self, master: torch.Tensor, learning_rate: float) -> None:
        reach = learning_rate * self._strength
        for a, b in self._adapters[id(master)]:
            unit = torch.eye(a.shape[0], device=a.device)
            a.copy_(torch.linalg.solve(unit + reach * (b.T @ b), a))
            b.copy_(torch.linalg.solve(unit + reach * (a @ a.T), b.T).T)


def _by_expert(a: torch.Tensor, b: torch.Tensor, lora_rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the pairs A[r, in], B[out, r] of every expert as views, of a linear layer its only one (`AdapterKind`)."""
    each_b = b.unflatten(1, (lora_rank, -1)).movedim(2, 0)
    return list(zip(a.unflatten(0, (-1, lora_rank)).unbind(), each_b.unbind(), strict=True))


ANCHOR_CLASSES: Mapping[AnchorKind, Callable[[Anchored], Anchor]] = {
    "l2sp": ElementAnchor.of,
    "ewc": ElementAnchor.of,
    "product": ProductAnchor.of,
}
"""The class of each kind of anchor."""


class AnchoredAdamW(torch.optim.AdamW):
    """AdamW for an engine that creates the master weights and calls `step` itself: see `DeepSpeedTrainer`."""

    anchor: Anchor | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        if self.anchor is None:
            return
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self.anchor.pull(master, group["lr"])


class SquaredGradients(torch.optim.Optimizer):
    """An optimizer that changes no weights and sums the squared gradients of each master weight tensor."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.sums: dict[int, torch.Tensor] = {}
        """Sums of squared gradients by the id of a master tensor: float32, in its shape."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue
                total = self.sums.setdefault(id(master), torch.zeros_like(master, dtype=torch.float32))
                total.addcmul_(master.grad.float(), master.grad.float())
