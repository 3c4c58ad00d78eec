"""Checkpointing above the cut leaves what is below it without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.recompute import recomputed


def test_nothing_below_the_cut_has_a_gradient(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    """transformers hooks the embeddings when checkpointing is turned on: backward would then go down to them."""
    base = base_of(llama_folder())
    blocks: Any = base.model.get_submodule(base.anatomy.blocks_module)
    entering: list[bool] = []
    hooks = [block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0].requires_grad)) for block in blocks]
    blocks[2].self_attn.q_proj.weight.requires_grad_(True)
    with recomputed(blocks[2:]):
        base.model(input_ids=torch.zeros(1, 8, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    blocks[2].self_attn.q_proj.weight.requires_grad_(False)
    assert entering == [False, False, False, True]


def test_leaving_by_an_exception_turns_it_off(llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]) -> None:
    base = base_of(llama_folder())
    blocks: Any = list(base.model.get_submodule(base.anatomy.blocks_module))
    during: list[bool] = []

    def run_out() -> None:
        with recomputed(blocks[2:]):
            during.extend(block.gradient_checkpointing for block in blocks)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        run_out()
    assert during == [False, False, True, True]
    assert not any(block.gradient_checkpointing or hasattr(block, "_gradient_checkpointing_func") for block in blocks)


class Plain(nn.Module):
    """A block as a class of transformers that has no switch for gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.num_calls = 0

    def forward(self, states: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        self.num_calls += 1
        return states + scale * torch.relu(self.inner(states)), None


def test_blocks_without_a_switch_are_recomputed_too() -> None:
    torch.manual_seed(0)
    blocks = [Plain(), Plain()]

    def gradients() -> list[torch.Tensor]:
        states = torch.arange(16.0).view(2, 8) / 16
        for block in blocks:
            states = block(states, scale=0.5)[0]
        states.square().sum().backward()
        found = [parameter.grad.clone() for block in blocks for parameter in block.parameters() if parameter.grad is not None]
        for block in blocks:
            block.zero_grad()
        return found

    kept = gradients()
    assert [block.num_calls for block in blocks] == [1, 1]
    with recomputed(blocks):
        again = gradients()
        assert [block.num_calls for block in blocks] == [3, 3]
        with torch.no_grad():
            blocks[0](torch.zeros(2, 8))
        assert blocks[0].num_calls == 4
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
    assert all("forward" not in vars(block) for block in blocks)
