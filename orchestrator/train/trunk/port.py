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

_companions: dict[type[nn.Module], int] = {}
"""How many values a class of block returns beside its hidden states, in a tuple. Found whenever states are taken, which the
self-test of a base does before anything is stored; a class that is not here returns hidden states alone."""


@contextmanager
def entering(blocks: nn.ModuleList, cut: int, hidden: torch.Tensor) -> Iterator[None]:
    """Skip the blocks below `cut` in this context, and give `hidden` [B, L, H] to the block above them.

    The input of block 0 is dropped. A cut of `len(blocks)` replaces the whole stack.
    """
    below = [blocks[index] for index in range(cut)]
    # The blocks below pass the embeddings on unchanged; the last of them returns the stored states instead.
    for block in below[:-1]:
        vars(block)["forward"] = _passes_on(block)
    vars(below[-1])["forward"] = _returns(below[-1], hidden)
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
    hooks = [blocks[cut - 1].register_forward_hook(_taker(cut, taken)) for cut in cuts]
    for block in above:
        vars(block)["forward"] = _passes_on(block)
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
        for block in above:
            del vars(block)["forward"]


def _answer(block: nn.Module, hidden: torch.Tensor) -> Any:
    """Return hidden states in the form in which a block returns them."""
    count = _companions.get(type(block))
    return hidden if count is None else (hidden, *[None] * count)


def _passes_on(block: nn.Module) -> Any:
    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return _answer(block, hidden_states)

    return forward


def _returns(block: nn.Module, hidden: torch.Tensor) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        return _answer(block, hidden)

    return forward


def _taker(cut: int, taken: dict[int, torch.Tensor]) -> Any:
    def take(module: nn.Module, inputs: Any, output: Any) -> None:
        states = output
        if isinstance(output, tuple):
            values: tuple[Any, ...] = output
            _companions[type(module)] = len(values) - 1
            states = values[0]
        taken[cut] = states.detach()

    return take
