"""Greedy answers to the prompts of a set, for exact match and for the prompts that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from orchestrator.data import TokenizedSet, padding
from orchestrator.train import heartbeat
from orchestrator.train.model.balance import without_router_logits
from orchestrator.train.ranks import Ranks

PROMPTS_AT_ONCE = 16
SPARE_TOKENS = 8
"""An answer may be so much longer than the longest wanted one."""


def prompt_and_answer(data: TokenizedSet, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids before the last supervised run of a document, and that run."""
    span = slice(int(data.offsets[index]), int(data.offsets[index + 1]))
    ids, supervised = np.asarray(data.ids[span]), np.asarray(data.supervised[span])
    end = int(np.flatnonzero(supervised)[-1]) + 1
    before = np.flatnonzero(~supervised[:end])
    start = int(before[-1]) + 1 if before.size else 0
    return ids[:start], ids[start:end]


def wanted_answers(data: TokenizedSet, tokenizer: Any) -> list[str]:
    """Return the texts that exact match compares with: each document's last supervised run, up to its end token."""
    stops = stop_ids(data, tokenizer)
    return [_said(prompt_and_answer(data, index)[1], tokenizer, stops) for index in range(len(data))]


def stop_ids(data: TokenizedSet, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end generation: those that end the data's answers, or the tokenizer's end token if unknown."""
    own = tokenizer.eos_token_id
    return data.stop_ids or ((own,) if own is not None else ())


def _said(ids: np.ndarray, tokenizer: Any, stops: Sequence[int]) -> str:
    """Return an answer's text up to the first token that ends it."""
    ended = np.flatnonzero(np.isin(ids, np.asarray(stops, np.int64)))
    return tokenizer.decode(ids[: ended[0]] if len(ended) else ids, skip_special_tokens=True)


def generate_answers(
    model: Any, tokenizer: Any, data: TokenizedSet, ranks: Ranks, *, rows: int = PROMPTS_AT_ONCE, synced: bool = False
) -> list[str]:
    """Generate each document's greedy continuation of its prompt, in document order, on every rank.

    Args:
        model: A whole causal language model (one that can `generate`).
        tokenizer: Its tokenizer.
        data: Documents with supervised answers.
        ranks: The ranks that the documents are distributed over.
        rows: Prompts computed at once.
        synced: Whether the ranks must make the same forward passes, as ZeRO-3 needs.
    """
    pairs = [prompt_and_answer(data, index) for index in range(len(data))]
    longest = max(len(answer) for _, answer in pairs) + SPARE_TOKENS
    # Prompts of like length share a batch: padding is computed, too. The index makes the order the same on every rank.
    by_length = sorted(range(len(pairs)), key=lambda index: (len(pairs[index][0]), index))
    batches = [by_length[start : start + rows] for start in range(0, len(by_length), rows)]
    num_rounds = -(-len(batches) // ranks.count)
    stops = stop_ids(data, tokenizer)
    mine: dict[int, str] = {}
    for turn in range(num_rounds):
        number = turn * ranks.count + ranks.rank
        # Under ZeRO-3 a rank without a batch repeats the first one, since the others gather weights with it at every pass.
        documents = batches[number] if number < len(batches) else batches[0] if synced else []
        if documents:
            prompts = [pairs[index][0] for index in documents]
            texts = continue_prompts(model, tokenizer, prompts, longest, ranks.device, stops=stops, synced=synced)
            mine |= dict(zip(documents, texts, strict=True))
    heartbeat.enter("waiting for the other ranks")  # their answers may be much longer
    found: dict[int, str] = {}
    # Reversed, so that rank 0's text counts for documents that a padding round has repeated.
    for part in reversed(ranks.gather(mine)):
        found |= part
    return [found[index] for index in range(len(pairs))]


@torch.no_grad()
def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    device: torch.device,
    *,
    stops: Sequence[int],
    synced: bool = False,
) -> list[str]:
    """Greedy continuations of token-id prompts, padded on the left, up to the first of the tokens in `stops`.

    The prompts of an encoder-decoder are padded on the right, as in training, and its answers begin after its start token.
    """
    encodes = bool(model.config.is_encoder_decoder)
    width = max(1, *(len(prompt) for prompt in prompts))
    pad = padding(tokenizer, stops)
    ids = np.full((len(prompts), width), pad, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(len(prompt)) if encodes else slice(width - len(prompt), None)
        ids[row, place], mask[row, place] = prompt, 1
    was_training = model.training
    model.eval()
    try:
        with without_router_logits(model):
            output = model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=list(stops) or None,
                synced_gpus=synced,
            )
    finally:
        model.train(was_training)
    return [_said(row[1 if encodes else width :].cpu().numpy(), tokenizer, stops) for row in output]
