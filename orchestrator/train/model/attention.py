"""Attention over packed rows, one document at a time.

Documents that share a row do not see each other. A kernel that takes a block-diagonal mask still computes every
pair of positions of the row; here each document is a separate call, and masked pairs are not computed. This is used on CPUs
only: on a GPU one large call is faster than many small ones.

transformers calls two functions of one name: one for a mask, once per forward pass, and one for attention, in every block,
which is handed that mask. So the mask is where the documents' lengths travel: every block gets them, also when it is computed
again in the backward pass, and no mask is built. Without document lengths (generation, classification) both do what
transformers' `sdpa` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_DOCUMENT = "by_document"
"""The name under which transformers finds these functions (`attn_implementation`)."""

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("document lengths", default=None)


@dataclass(frozen=True)
class Documents:
    """The borders of packed documents, passed in the place of an attention mask."""

    lengths: tuple[int, ...]
    """Tokens of every document, row after row; together all positions. The padding at a row's end is a document too."""
    window: int | None = None
    """Positions, its own included, that a token attends to in a sliding-window layer."""


@contextmanager
def documents_apart(config: Any, position_ids: torch.Tensor) -> Iterator[None]:
    """Compute attention by document in forward passes inside this context if `config` names this attention; else change
    nothing.

    Args:
        config: The transformers model's config.
        position_ids: int64[B, L]. A document begins with each row, and wherever positions do not go on by one.
    """
    if config._attn_implementation != BY_DOCUMENT:
        yield
        return
    token = _lengths.set(document_lengths(position_ids))
    try:
        yield
    finally:
        _lengths.reset(token)


def document_lengths(position_ids: torch.Tensor) -> tuple[int, ...]:
    """Return the lengths of the documents in position_ids[B, L], row after row."""
    begins = pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).flatten()
    borders = [*begins.nonzero()[:, 0].tolist(), begins.numel()]
    return tuple(end - start for start, end in pairwise(borders))


@cache
def leave_uncompiled() -> None:
    """Keep torch.compile out of this attention: its calls are the documents', of new lengths in every row."""
    AttentionInterface.register(BY_DOCUMENT, torch.compiler.disable(_attention))


def _mask(
    batch_size: int, q_length: int, kv_length: int, *, local_size: int | None = None, **options: Any
) -> torch.Tensor | Documents | None:
    lengths = _lengths.get()
    if lengths is None:
        return sdpa_mask(batch_size, q_length, kv_length, local_size=local_size, **options)
    assert sum(lengths) == batch_size * q_length == batch_size * kv_length
    return Documents(lengths, local_size)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Documents | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention of query[B, heads, L, D] over key and value[B, kv_heads, L, D]: [B, L, heads, D]."""
    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    by_document = zip(*(_documents(states, attention_mask.lengths) for states in (query, key, value)), strict=True)
    results = [
        scaled_dot_product_attention(
            *document,
            attn_mask=(mask := _band(document[0], attention_mask.window)),
            dropout_p=dropout,
            # A mask rules out the flash kernel, so that one is given only where the window is narrower than the document.
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for document in by_document
    ]
    tokens = torch.cat([result[0].transpose(0, 1) for result in results])
    return tokens.unflatten(0, (query.shape[0], query.shape[2])), None


def _documents(states: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Split states[B, heads, L, D] into one [1, heads, n, D] per document.

    The backward pass of a split is one concatenation; slices would each add a tensor of zeros of the full size.
    """
    return [document.transpose(0, 1)[None] for document in states.transpose(1, 2).flatten(0, 1).split(lengths)]


def _band(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Return bool[n, n], what each position of a document attends to, if the window is narrower than the document; else None."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - window)


AttentionInterface.register(BY_DOCUMENT, _attention)
AttentionMaskInterface.register(BY_DOCUMENT, _mask)
