"""What the self-test of an encoder-decoder compares with: documents with prompts, and the class's own losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.data import TokenizedSet
from orchestrator.train.model.encoder_decoder import decoder_start


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
