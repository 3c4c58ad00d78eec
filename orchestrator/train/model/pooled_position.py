"""Prove before training that the transformers class of a decoder reads the class off the position that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.errors import BaseError
from orchestrator.work.execution import Padding


def check_pooled_position(anatomy: ModelAnatomy, padding: Padding, documents: Sequence[Sequence[int]]) -> None:
    """Check that the class reads the last token of each of these documents, padded on either side.

    The class itself is run, without weights: in place of its backbone stands a module whose hidden states are the numbers of
    the positions, so that the logits name the position.

    Raises:
        BaseError: it reads another position; or there is no such class.
    """
    model = _position_reader(anatomy, padding)
    width = max(map(len, documents))
    for row in documents:
        fill = [padding.token_id] * (width - len(row))
        own, other = [1] * len(row), [0] * len(fill)
        right = ([*row, *fill], [*own, *other], len(row) - 1)
        left = ([*fill, *row], [*other, *own], width - 1)
        for ids, mask, last in (right, left):
            found = model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask])).logits[0, 0].item()
            if round(found) != last:
                raise BaseError(
                    f"{type(model).__name__} reads the class of a text off token {round(found)} of {width}, not off its last one "
                    f"({last}), where texts are padded with {padding.token!r}",
                    where=anatomy.folder,
                    expected="the position that training reads",
                    remedy="set classify.pooling: mean, which the bundle serves by its own head file",
                )


def _position_reader(anatomy: ModelAnatomy, padding: Padding) -> Any:
    config: Any = AutoConfig.from_pretrained(anatomy.folder, local_files_only=True, trust_remote_code=False, num_labels=2)
    config.get_text_config().pad_token_id = padding.token_id
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config)
    width = anatomy.classifier_inputs
    head = nn.Linear(width, 2, bias=False)
    nn.init.constant_(head.weight, 1.0 / width)
    model.set_submodule(anatomy.classifier_weight.rpartition(".")[0], head)
    setattr(model, model.base_model_prefix, _Positions(width))
    return model.eval()


class _Positions(nn.Module):
    """A backbone whose hidden states [B, L, H] are the numbers of their positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        positions = torch.arange(input_ids.shape[1], dtype=torch.float32)
        states: Any = positions[None, :, None].expand(*input_ids.shape, self._width)
        return BaseModelOutputWithPast(last_hidden_state=states)
