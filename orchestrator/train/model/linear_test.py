"""Whether the linear layers of a class are what adapters assume: called, and a product with their weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.spec.tasks import Task
from orchestrator.train.model.self_test import SelfTest, computing


@torch.no_grad()
def not_linear(model: nn.Module, anatomy: ModelAnatomy, task: Task) -> dict[str, str]:
    """Return the weights of `anatomy.linears` that are not what LoRA assumes, each with the reason: their module is never called
    (its class reads the weight itself: Mamba's dt_proj), or its result is not the input times the weight plus the bias (a
    grouped projection).

    A module that is not called counts only if none of its namesakes in other blocks is.
    """
    test = SelfTest(model, anatomy, task, next(model.parameters()).device)
    odd: dict[str, str] = {}
    called: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            called.add(_within_block(name))
            weight: Any = layer.weight if name in anatomy.transposed else layer.weight.T  # pyright: ignore
            expected = args[0].float() @ weight.float()
            bias: Any = getattr(layer, "bias", None)
            expected = expected if bias is None else expected + bias.float()
            if expected.shape != output.shape or not torch.allclose(expected, output.float(), rtol=1e-3, atol=1e-3):
                odd[name] = "its result is not the product of input and weight"

        return look

    names = [name for block in anatomy.linears for name in block]
    hooks = [model.get_submodule(name.rpartition(".")[0]).register_forward_hook(watch(name)) for name in names]
    try:
        with computing(model):
            test.own_losses()
    finally:
        for hook in hooks:
            hook.remove()
    idle = {name: "its module is never called" for name in names if _within_block(name) not in called}
    return odd | idle


def _within_block(name: str) -> str:
    """Return a name without its numbers: of a block, and of an expert."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
