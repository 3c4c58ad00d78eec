"""Entry and exit of hidden states: stored ones enter a model instead of its lower blocks, and new ones are taken from it.

The blocks stay in their list, so that layer numbers, attention types and masks do not change. Only the forward method of a
block is replaced, on the module object itself, and restored after the call. Names, parameters and hooks stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def entering(blocks: nn.ModuleList, cut: int, hidden: torch.Tensor) -> Iterator[None]:
    """Skip the blocks below `cut` in this context, and give `hidden` [B, L, H] to the block above them.

    The input of block 0 is dropped. A cut of `len(blocks)` replaces the whole stack.
    """
    below = [blocks[index] for index in range(cut)]
    # The blocks below pass the embeddings on unchanged; the last of them returns the stored states instead.
    for block in below[:-1]:
        vars(block)["forward"] = _pass_on
    vars(below[-1])["forward"] = _returns(hidden)
    try:
        yield
    finally:
        for block in below:
            del vars(block)["forward"]


@contextmanager
def leaving(blocks: nn.ModuleList, cuts: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Store the hidden states [B, L, H] that enter block `cut` in the dictionary at each forward pass in this context, for
    every cut of at least 1; no block above the highest cut is computed."""
    taken: dict[int, torch.Tensor] = {}
    above = [blocks[index] for index in range(max(cuts), len(blocks))]
    others: list[int] = []
    hooks = [blocks[cut - 1].register_forward_hook(_taker(cut, taken, others)) for cut in cuts]
    for block in above:
        vars(block)["forward"] = _passes_on(others)
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
        for block in above:
            del vars(block)["forward"]


def _pass_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _returns(hidden: torch.Tensor) -> Any:
    def forward(*_: Any, **__: Any) -> torch.Tensor:
        return hidden

    return forward


def _passes_on(others: list[int]) -> Any:
    """Return a forward method that gives its input back, in the form that the block below has answered in."""

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *[None] * others[-1]) if others else hidden_states

    return forward


def _taker(cut: int, taken: dict[int, torch.Tensor], others: list[int]) -> Any:
    """Return a hook that stores a block's hidden states, and appends to `others` how many values came with them in a tuple."""

    def take(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            others.append(len(output) - 1)  # pyright: ignore[reportUnknownArgumentType]
            output = output[0]  # pyright: ignore[reportUnknownVariableType]
        taken[cut] = output.detach()

    return take
