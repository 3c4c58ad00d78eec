"""Rows of new tokens that are trained alone: in the embeddings, and in the output projection.

Shapes: n new tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.values import LayerSelection
from orchestrator.train.model.base import LoadedBase


class _WithNewRows(nn.Module):
    """A frozen layer with V rows, n of which are replaced by the trained parameter `new_rows` [n, H]."""

    def __init__(self, base_layer: nn.Module, rows: nn.Parameter, ids: torch.Tensor) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.register_parameter(NEW_ROWS, rows)
        # A plain attribute: the model's buffers are those of the base.
        self._ids = ids

    @property
    def weight(self) -> Any:
        """The frozen weight of the wrapped layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)


class EmbeddingWithNewRows(_WithNewRows):
    """Embeddings whose look-up of a new token gives its trained row."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up int64[...] -> [..., H]."""
        found = self.base_layer(input_ids)
        matches = input_ids[..., None] == self._ids.to(input_ids.device)
        # Gemma's embeddings scale their rows after the look-up.
        rows = getattr(self, NEW_ROWS) * _scale_of(self.base_layer)
        return torch.where(matches.any(-1, keepdim=True), rows[matches.int().argmax(-1)], found)


class ProjectionWithNewRows(_WithNewRows):
    """An output projection whose logits of new tokens come from their trained rows."""

    def __init__(self, base_layer: nn.Module, rows: nn.Parameter, ids: torch.Tensor, bias: torch.Tensor | None) -> None:
        """
        Args:
            bias: Frozen bias of the new tokens [n]: ZeRO-3 partitions the layer's own outside of its forward pass.
        """
        super().__init__(base_layer, rows, ids)
        self._bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute [..., H] -> logits [..., V]."""
        logits = nn.functional.linear(hidden, getattr(self, NEW_ROWS), self._bias)
        return self.base_layer(hidden).index_copy(-1, self._ids.to(hidden.device), logits)


def install_new_rows(base: LoadedBase, selection: LayerSelection, undo: ExitStack) -> set[str]:
    """Replace the layers whose new rows the selection trains, until `undo` runs; return the names of the rows.

    They start as the base has them. A tied output projection computes with the same parameter as the embeddings.
    """
    names = {name for name in selection.trainable if name.endswith(f".{NEW_ROWS}")}
    if not names:
        return names
    anatomy = base.anatomy
    ids = torch.tensor(anatomy.new_rows)
    embedding, head = anatomy.embeddings[0], anatomy.head_weight
    rows = _rows_of(base, embedding, ids)
    _install(base, embedding, EmbeddingWithNewRows(_layer(base, embedding), rows, ids), undo)
    tied = anatomy.tied and not selection.unties_head and not base.load.traits.head.is_new
    if tied or _rows_name(head) in names:
        bias = _rows_of(base, anatomy.head_bias, ids).detach() if anatomy.head_bias else None
        head_rows = rows if tied else _rows_of(base, head, ids)
        _install(base, head, ProjectionWithNewRows(_layer(base, head), head_rows, ids, bias), undo)
    return names


def _rows_name(weight: str) -> str:
    return weight.removesuffix("weight") + NEW_ROWS


def _rows_of(base: LoadedBase, name: str, ids: torch.Tensor) -> nn.Parameter:
    values = base.read_original([name])[name][ids.to(base.device)].to(base.dtype)
    return nn.Parameter(values.clone(), requires_grad=False)


def _layer(base: LoadedBase, weight: str) -> nn.Module:
    return base.model.get_submodule(weight.rpartition(".")[0])


def _install(base: LoadedBase, weight: str, wrapper: nn.Module, undo: ExitStack) -> None:
    place = weight.rpartition(".")[0]
    parent, attribute = base.model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    layer = getattr(parent, attribute)
    undo.callback(setattr, parent, attribute, layer)
    wrapper.train(layer.training)
    setattr(parent, attribute, wrapper)


def _scale_of(embedding: nn.Module) -> float | torch.Tensor:
    """Return the factor that an embedding module applies to its rows (transformers' scaled embeddings), 1 for a plain one."""
    return getattr(embedding, "embed_scale", 1.0)
