"""The head of an encoder-decoder: a document's prompt is the encoder's input, its completion what the decoder is to predict.

Shapes: B rows of one document each, L tokens a row, P tokens of the longest prompt, T of the longest completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.errors import BaseError
from orchestrator.spec.tasks import Task
from orchestrator.train.model.heads import IGNORED, Head, LanguageModelHead, Parts, Supervised, Targets, attention_mask, head_of

LABELS = "labels"
"""Key under which `run_blocks` is given the labels: they say where a prompt ends."""


class Sides(NamedTuple):
    """A micro-batch as an encoder-decoder takes it."""

    prompts: torch.Tensor
    """int64[B, P], padded at the end."""
    prompt_mask: torch.Tensor
    """int64[B, P]: 1 at tokens."""
    decoder_ids: torch.Tensor
    """int64[B, T]: the completions, shifted right behind the start token."""

    def arguments(self) -> dict[str, torch.Tensor]:
        """Return the arguments of the class's forward pass. The decoder needs no mask: padding comes last, and it is causal."""
        return {"input_ids": self.prompts, "attention_mask": self.prompt_mask, "decoder_input_ids": self.decoder_ids}


def split_rows(input_ids: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, start: int) -> Sides:
    """Split rows of one document each before their first supervised token.

    Args:
        input_ids: int64[B, L].
        labels: int64[B, L], already shifted: the token to be predicted at each position, or -100.
        lengths: int64[B].
        start: The id that the decoder begins with.
    """
    supervised = labels != IGNORED
    counts = supervised.sum(1)
    first = supervised.int().argmax(1)
    prompt_lengths = torch.where(counts > 0, first + 1, lengths)
    width, longest = (max(1, int(numbers.max())) for numbers in (prompt_lengths, counts))
    # The supervised positions of a row first, in their order.
    order = torch.argsort((~supervised).int(), dim=1, stable=True)[:, : longest - 1]
    targets = labels.gather(1, order).clamp(min=0)
    decoder_ids = torch.cat([targets.new_full((len(targets), 1), start), targets], dim=1)
    return Sides(input_ids[:, :width], attention_mask(width, prompt_lengths), decoder_ids)


def decoder_start(model: Any) -> int:
    """Return the id that `generate` begins a decoder's input with.

    Raises:
        BaseError: the base names none.
    """
    generation, config = model.generation_config, model.config
    found = (generation.decoder_start_token_id, getattr(config, "decoder_start_token_id", None), generation.bos_token_id)
    start = next((each for each in found if isinstance(each, int)), None)
    if start is None:
        raise BaseError(
            "the base does not say which token its decoder begins with",
            where=str(getattr(config, "name_or_path", "")),
            expected="decoder_start_token_id in its generation_config.json or config.json",
            remedy="set it to the token that the model was trained with",
        )
    return start


class EncoderDecoderHead(LanguageModelHead):
    """The class's own output projection, at the positions of the completions."""

    def run_blocks(
        self, parts: Parts, inputs: Mapping[str, torch.Tensor], position_ids: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the class's logits [B, T, V] of the tokens of each completion."""
        sides = split_rows(inputs["input_ids"], inputs[LABELS], lengths, decoder_start(parts.model))
        return parts.model(**sides.arguments(), use_cache=False).logits

    def select(self, parts: Parts, states: torch.Tensor, targets: Targets) -> Supervised:
        chosen = targets.labels != IGNORED
        there = torch.arange(states.shape[1], device=states.device) < chosen.sum(1)[:, None]
        return Supervised(states[there], targets.labels[chosen], targets.document_ids[chosen])


def head_for(anatomy: ModelAnatomy, task: Task) -> Head:
    """Return the head that a task trains a base with."""
    return EncoderDecoderHead() if anatomy.kind == "encoder_decoder" else head_of(task)
