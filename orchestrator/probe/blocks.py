"""The blocks of a model with the arguments that it gives them, on tensors without memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.probe.allocations import AllocationCounter
from orchestrator.train.model.attention import BY_DOCUMENT, documents_apart
from orchestrator.train.model.heads import attention_mask, document_places


@dataclass(frozen=True)
class BlockCall:
    """A block with the arguments that a model gives it."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def input(self) -> torch.Tensor:
        """Return new hidden states like those that the block was called with."""
        return torch.empty_like(self.args[0] if self.args else self.kwargs["hidden_states"])

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's hidden states for others than those that it was called with."""
        if self.args:
            result = self.block(hidden, *self.args[1:], **self.kwargs)
        else:
            result = self.block(**{**self.kwargs, "hidden_states": hidden})
        return next(each for each in tree_iter(result) if isinstance(each, torch.Tensor))


class _ReachedError(Exception):
    """Raised to leave a model at the last block that is looked for."""


def capture_calls(
    model: Any, anatomy: ModelAnatomy, mode: FakeTensorMode, wanted: Sequence[int], length: int, *, by_document: bool
) -> list[BlockCall]:
    """Run a model as training does, as far as the last block that is wanted, and return the calls of these blocks.

    Args:
        model: The class, with fake parameters.
        wanted: Numbers of blocks.
        length: Tokens of the one row.
        by_document: Whether documents are computed one by one.
    """
    blocks = list(model.get_submodule(anatomy.blocks_module).children())
    calls: dict[int, BlockCall] = {}
    with ExitStack() as stack:
        for number in wanted:
            hook = partial(_capture, calls, number, len(wanted))
            stack.callback(blocks[number].register_forward_pre_hook(hook, with_kwargs=True).remove)
        if by_document:
            model.set_attn_implementation(BY_DOCUMENT)
            # Real numbers, since the documents' lengths are values.
            stack.enter_context(documents_apart(model.config, torch.arange(length)[None]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        # Answers where a class looks at values.
        stack.enter_context(AllocationCounter())
        with suppress(_ReachedError):
            _run(model, anatomy, length)
    return [calls[number] for number in wanted]


def _capture(
    calls: dict[int, BlockCall], number: int, num_wanted: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    calls[number] = BlockCall(block, args, kwargs)
    if len(calls) == num_wanted:
        raise _ReachedError


def _run(model: Any, anatomy: ModelAnatomy, length: int) -> None:
    """Run a model on a row as `train.model.heads` does: every document of one token, so that they are kept apart."""
    ids, lengths = torch.zeros(1, length, dtype=torch.long), torch.full((1,), length)
    if anatomy.kind == "decoder":
        places = document_places(anatomy.ways, ids, lengths)
        model.get_submodule(anatomy.backbone)(input_ids=ids, use_cache=False, **places)
    elif anatomy.kind == "encoder":
        model(input_ids=ids, attention_mask=attention_mask(length, lengths))
    else:
        model(input_ids=ids, attention_mask=attention_mask(length, lengths), decoder_input_ids=ids, use_cache=False)
