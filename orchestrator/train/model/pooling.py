"""What a classifier reads of a text: the config of its model, and the pooling of hidden states.

Shapes: B rows, L tokens a row, H hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from orchestrator.anatomy.values import Pooling
from orchestrator.work.execution import BaseLoad

Read = Literal["class", "mean", "cls", "last"]


def read_by_head(pooling: Pooling, *, encoder: bool) -> Read:
    """Return what the objective reads: `class` if the model's own forward computes the logits, as an encoder's class does."""
    if not pooling.by_class:
        return pooling.kind
    return "class" if encoder else "last"


def pooled(states: torch.Tensor, lengths: torch.Tensor, read: Read) -> torch.Tensor:
    """Return [B, H]: one vector for each row's document, of states [B, L, H] and lengths int64[B]. An empty row has none: its
    vector means nothing.

    A mean is summed in float32, as `classify.py` in the bundle does.
    """
    lengths = lengths.clamp(min=1)
    if read == "mean":
        inside = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        return ((states.float() * inside[..., None]).sum(1) / lengths[:, None]).to(states.dtype)
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, lengths - 1 if read == "last" else torch.zeros_like(lengths)]


def classify_config(load: BaseLoad) -> PreTrainedConfig:
    """Return the config of a classifier on this base: its classes, its padding token, and how its class pools."""
    names = load.class_names or tuple(f"class {number}" for number in range(load.num_classes))
    config = AutoConfig.from_pretrained(
        load.folder,
        local_files_only=True,
        trust_remote_code=False,
        num_labels=load.num_classes,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **load.pooling.config,
    )
    text = config.get_text_config()
    if load.padding is not None:
        text.pad_token_id = load.padding.token_id
    elif text.pad_token_id is None:
        # As older versions chose it: transformers refuses batches of a sequence classifier without a padding token.
        text.pad_token_id = text.eos_token_id if isinstance(text.eos_token_id, int) else 0
    return config


def remove_unread(model: nn.Module, names: list[str]) -> None:
    """Replace the modules of these parameters by ones without: new parts of the transformers class that a head of ours does not
    read would otherwise be random weights that nobody trains."""
    for name in sorted({name.rpartition(".")[0] for name in names}):
        model.set_submodule(name, nn.Identity())
