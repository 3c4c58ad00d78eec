"""The engine without DeepSpeed: AdamW on one flat float32 master copy, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from orchestrator.plan.remedies import LearningGroup
from orchestrator.spec.adapters import LORA_A, LORA_B
from orchestrator.train.anchors import Anchor, SquaredGradients
from orchestrator.train.engines.engine import ADAM_BETAS, ADAM_EPSILON, check_norm, register_engine
from orchestrator.train.ranks import ALONE, Ranks


class TorchEngine:
    """The numerics of DeepSpeed's bf16 optimizer, with nothing partitioned.

    The trainable tensors are laid end to end in flat float32 buffers (masters, gradient sums, and Adam's moments inside
    torch's AdamW); the model keeps its own tensors, which the masters are rounded into after each step. A tensor's
    gradient is added to its sum, and let go of, as soon as the backward pass has it: never are all of them there. The
    fused AdamW makes no temporary copies; the other variants make two of all trainable weights.

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
        groups: Sequence[LearningGroup] = (),
        measuring: bool = False,
    ) -> None:
        """
        Args:
            groups: Parameter groups over the trainable tensors, in their order; without them all have one rate.
            measuring: Whether steps sum squared gradients and change no weight.
        """
        self.objective = objective
        self._anchor: Anchor | None = None
        self._ranks = ranks
        self._names = [name for name, _ in learning_parameters]
        self._groups = list(groups) or [LearningGroup(tuple(self._names), 1.0, True)]
        self.parameters = [parameter for _, parameter in learning_parameters]
        self._grad_clip = 0.0 if measuring else grad_clip
        with torch.no_grad():
            self._master = torch.cat([p.detach().reshape(-1).float() for p in self.parameters])
        self._gradient = torch.zeros_like(self._master)
        self._parts = self._make_parts()
        self._optimizer = (
            SquaredGradients(self._parts)
            if measuring
            else torch.optim.AdamW(
                [{"params": [part]} for part in self._parts],
                lr=0.0,
                betas=ADAM_BETAS,
                eps=ADAM_EPSILON,
                weight_decay=weight_decay,
                fused=True,
            )
        )
        # Rounds are summed in float32 and each 16-bit gradient is freed at once; autograd itself would add them up in 16 bits.
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
        for group, options in zip(self._groups, self._optimizer.param_groups, strict=False):
            options["lr"] = learning_rate * group.rate_factor
        self._optimizer.step()
        if self._anchor is not None:
            for group, part in zip(self._groups, self._parts, strict=True):
                self._anchor.pull(part, learning_rate * group.rate_factor)
        self._gradient.zero_()
        self._write_back()
        return norm

    def full_tensors(self) -> dict[str, torch.Tensor]:
        if not self._ranks.first:
            return {}
        return {name: p.detach().to("cpu", copy=True) for name, p in zip(self._names, self.parameters, strict=True)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {"master": self._master.detach()}
        for key in self._optimizer.state.get(self._parts[0], {}):
            moments = [self._optimizer.state[part][key] for part in self._parts]
            # A tensor without dimensions is Adam's step count, the same for all parts.
            state[key] = torch.cat(moments) if moments[0].ndim else moments[0]
        return {key: value.to("cpu", copy=True) for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._master.copy_(state["master"])
        moments = {key: value for key, value in state.items() if key != "master"}
        sizes = [part.numel() for part in self._parts]
        cut = {key: value.split(sizes) if value.ndim else [value] * len(sizes) for key, value in moments.items()}
        for index, part in enumerate(self._parts if moments else ()):
            self._optimizer.state[part] = {key: values[index].to(part.device, copy=True) for key, values in cut.items()}
        self._write_back()

    def set_anchor(self, anchor: Anchor) -> None:
        self._anchor = anchor

    @torch.no_grad()
    def refresh_masters(self) -> None:
        for parameter, master in zip(self.parameters, self._views(self._master), strict=True):
            master.copy_(parameter)

    def anchored_masters(self) -> list[torch.Tensor]:
        return [part for group, part in zip(self._groups, self._parts, strict=True) if group.anchored]

    def squared_gradients(self) -> list[torch.Tensor]:
        assert isinstance(self._optimizer, SquaredGradients), "only an engine built with measuring=True sums squared gradients"
        return [self._optimizer.sums[id(part)] for part in self.anchored_masters()]

    def adapters(self) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return (A, B) of every adapter as views of the master weights, by the part that contains them."""
        found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        views = dict(zip(self._names, self._views(self._master), strict=True))
        for group, part in zip(self._groups, self._parts, strict=True):
            names = [name for name in group.names if name.endswith(LORA_A)]
            found[id(part)] = [(views[name], views[name.removesuffix(LORA_A) + LORA_B]) for name in names]
        return found

    @property
    def num_elements(self) -> int:
        """Return the number of trainable elements."""
        return self._master.numel()

    @property
    def state_bytes(self) -> int:
        states = [self._optimizer.state.get(part, {}) for part in self._parts]
        moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [self._master, *moments])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters:
            parameter.grad = None
        self._optimizer.state.clear()

    def _make_parts(self) -> list[nn.Parameter]:
        """Make the master weights and their gradients by group: views of the flat buffers."""
        sizes = dict(zip(self._names, (p.numel() for p in self.parameters), strict=True))
        cuts = [sum(sizes[name] for name in group.names) for group in self._groups]
        parts = [nn.Parameter(piece) for piece in self._master.split(cuts)]
        for part, gradient in zip(parts, self._gradient.split(cuts), strict=True):
            part.grad = gradient
        return parts

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Split `flat` into the shapes of the trainable tensors."""
        pieces = flat.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _write_back(self) -> None:
        for parameter, master in zip(self.parameters, self._views(self._master), strict=True):
            parameter.copy_(master)


def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        total.add_(cast("torch.Tensor", parameter.grad))
        parameter.grad = None

    return add
