"""The documents of the self-test, and what it compares with for an encoder-decoder: the class's own losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.data import TokenizedSet
from orchestrator.train.model.encoder_decoder import decoder_start

LENGTHS = (5, 8, 11, 5)
"""Tokens of the documents. Their sum is no multiple of the width that rows are padded to."""


def documents_of(model: Any, anatomy: ModelAnatomy, *, num_classes: int) -> TokenizedSet:
    """Return documents of LENGTHS tokens with ordinary ids: none that the config gives a meaning (padding, images)."""
    config = model.config.get_text_config()
    ordinary = np.setdiff1d(np.arange(min(anatomy.vocab_size, 1000)), sorted(_special_ids(model.config) | _special_ids(config)))
    count = sum(LENGTHS)
    # Steps through the ids that visit many of them in no order that a model could have learned.
    ids = ordinary[(np.arange(count) * 7919 + 13) % len(ordinary)].astype(np.int32)
    labels = np.arange(len(LENGTHS)) % num_classes if num_classes else np.full(len(LENGTHS), -1)
    return TokenizedSet(
        ids=ids,
        supervised=np.ones(count, dtype=bool),
        offsets=np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64),
        labels=labels.astype(np.int32),
        rows=np.arange(len(LENGTHS), dtype=np.int64),
    )


def joined(data: TokenizedSet) -> TokenizedSet:
    """Return the documents as one, whose losses count where those of the documents do."""
    supervised = np.ones(data.num_tokens, dtype=bool)
    supervised[data.offsets[:-1]] = False
    return TokenizedSet(
        ids=data.ids,
        supervised=supervised,
        offsets=np.asarray([0, data.num_tokens], dtype=np.int64),
        labels=data.labels[:1],
        rows=data.rows[:1],
    )


def _special_ids(config: Any) -> set[int]:
    """Return the ids that a config names: `pad_token_id`, `image_token_index`."""
    found: set[int] = set()
    for key, value in vars(config).items():
        if key.endswith(("token_id", "token_index", "token_ids")):
            values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
            found |= {int(each) for each in values if isinstance(each, int)}
    return found


def with_prompts(data: TokenizedSet) -> TokenizedSet:
    """Return the documents with their first half as the prompt."""
    place = np.arange(data.num_tokens) - np.repeat(data.offsets[:-1], data.lengths)
    return replace(data, supervised=place >= np.repeat((data.lengths + 1) // 2, data.lengths))


def completion_losses(model: Any, data: TokenizedSet, device: torch.device) -> np.ndarray:
    """Return the loss of every token of the completions, each document by a call of its own."""
    found: list[torch.Tensor] = []
    start = decoder_start(model)
    for index in range(len(data)):
        ids, supervised = data.document(index)
        prompt, answer = (
            torch.from_numpy(part.astype(np.int64)).to(device)[None] for part in (ids[~supervised], ids[supervised])
        )
        shifted = torch.cat([torch.full_like(answer[:, :1], start), answer[:, :-1]], dim=1)
        logits = model(input_ids=prompt, decoder_input_ids=shifted, use_cache=False).logits[0].float()
        found.append(nn.functional.cross_entropy(logits, answer[0], reduction="none"))
    return torch.cat(found).double().cpu().numpy()
