"""The engine without DeepSpeed: AdamW on one flat float32 master copy, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from orchestrator.train.engine import ADAM_BETAS, ADAM_EPSILON, check_norm, register_engine
from orchestrator.train.ranks import ALONE, Ranks


class TorchEngine:
    """The numerics of DeepSpeed's bf16 optimizer, with nothing partitioned.

    The learning tensors are laid end to end in flat float32 buffers (masters, gradient sums, and Adam's moments inside
    torch's AdamW); the model keeps its own tensors, which the masters are rounded into after each step. A tensor's
    gradient is added to its sum, and let go of, as soon as the backward pass has it: never are all of them there. The
    fused AdamW makes no temporary copies; the others make two of everything that learns.

    Ranks that share a trial each hold all of it. Once a step the sums of gradients are added up over them, in float32, and
    every rank takes the same update: masters, moments and weights stay the same bits on all.
    """

    name = "TorchEngine"
    communicates_in_backward = False

    def __init__(
        self,
        objective: nn.Module,
        learning_parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        weight_decay: float,
        grad_clip: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self.objective = objective
        self._ranks = ranks
        self._names = [name for name, _ in learning_parameters]
        self.parameters = [parameter for _, parameter in learning_parameters]
        self._grad_clip = grad_clip
        with torch.no_grad():
            self._master = nn.Parameter(torch.cat([p.detach().reshape(-1).float() for p in self.parameters]))
        self._gradient = torch.zeros_like(self._master, requires_grad=False)
        self._optimizer = torch.optim.AdamW(
            [self._master], lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=weight_decay, fused=True
        )
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_adder(total))
            for parameter, total in zip(self.parameters, self._views(self._gradient), strict=True)
        ]
        register_engine(self)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.objective(**batch)

    def backward(self, loss_sum: torch.Tensor, scale: float) -> None:
        (loss_sum * scale).backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        self._ranks.sum_in_place(self._gradient)
        norm = check_norm(self._gradient.norm().item())
        if 0 < self._grad_clip < norm:
            self._gradient.mul_(self._grad_clip / (norm + 1e-6))
        self._master.grad = self._gradient
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._gradient.zero_()
        self._write_back()
        return norm

    def full_tensors(self) -> dict[str, torch.Tensor]:
        if not self._ranks.first:
            return {}
        return {name: p.detach().to("cpu", copy=True) for name, p in zip(self._names, self.parameters, strict=True)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {"master": self._master.detach()}
        state |= {key: value for key, value in self._optimizer.state[self._master].items() if torch.is_tensor(value)}
        return {key: value.to("cpu", copy=True) for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._master.copy_(state["master"])
        moments = {key: value for key, value in state.items() if key != "master"}
        if moments:
            self._optimizer.state[self._master] = {
                key: value.to(self._master.device, copy=True) for key, value in moments.items()
            }
        self._write_back()

    @property
    def num_elements(self) -> int:
        """How many numbers learn."""
        return self._master.numel()

    @property
    def state_bytes(self) -> int:
        moments = [value for value in self._optimizer.state[self._master].values() if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [self._master, *moments])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters:
            parameter.grad = None
        self._optimizer.state.clear()

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """`flat` cut into the learning tensors' shapes."""
        pieces = flat.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _write_back(self) -> None:
        for parameter, master in zip(self.parameters, self._views(self._master.detach()), strict=True):
            parameter.copy_(master)


def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        total.add_(cast("torch.Tensor", parameter.grad))
        parameter.grad = None

    return add
