"""Checkpointing above the cut leaves what is below it without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.errors import TrainingError
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


def test_a_block_that_would_not_heed_it_is_refused() -> None:
    with pytest.raises(TrainingError, match="class Linear cannot"), recomputed([nn.Linear(2, 2)]):
        pass
