"""Checkpointing above the cut leaves what is below it without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orchestrator.train.base import LoadedBase
from orchestrator.train.recompute import recomputed


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
