"""Gradient checkpointing, only where there is a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def recomputed_from(model: Any, blocks: Any, cut: int) -> Iterator[None]:
    """Recompute the activations of the blocks from `cut` up in the backward pass, instead of keeping them.

    Non-reentrant: the reentrant kind gives no gradient, silently, where a block's input needs none, which is so at
    the cut. Below it nothing is kept anyway, once the hook is off again that transformers sets with it: a gradient on the
    embeddings, which would drive the backward pass through every block below the cut and keep their activations.

    Args:
        model: A transformers model.
        blocks: Its blocks, in order.
        cut: The first block that holds anything that learns.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    for block in blocks[:cut]:
        block.gradient_checkpointing = False
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
