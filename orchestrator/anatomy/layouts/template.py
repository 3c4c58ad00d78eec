"""Row of the layout table: tensor templates, config keys and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TensorTemplate:
    """One tensor of a layout.

    `name` is relative to its block (or complete, outside the blocks). Each axis of `shape` is a sum of
    products of numbers and size names (`heads*head_dim`, `3*hidden`). `linear` marks a matrix product:
    what LoRA adapts and quantization compresses. `stacked` marks the matrices [experts, out, in] of routed experts, which
    are one parameter, `router` what chooses among them. A tensor with `when` exists only where that config key is true.
    """

    name: str
    shape: tuple[str, ...]
    linear: bool = False
    stacked: bool = False
    router: bool = False
    when: str | None = None


SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size",),
    "intermediate": ("intermediate_size",),
    "blocks": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "positions": ("max_position_embeddings",),
}
GROUPED_KEYS: Mapping[str, tuple[str, ...]] = {**SIZE_KEYS, "kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",)}
"""With grouped-query attention and a head width of its own; other layouts have as many key heads as heads, hidden/heads wide."""


DROPOUT_KEYS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
)
"""Config keys, of any layout, for dropout rates in the embeddings and the blocks."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of the models of one type."""

    model_type: str
    kind: Literal["decoder", "encoder"]
    backbone: str
    """Attribute that returns hidden states; also the prefix that some checkpoints omit."""
    blocks_module: str
    embeddings: tuple[TensorTemplate, ...]
    block: tuple[TensorTemplate, ...]
    """A block with a dense MLP. The order of its templates has a meaning: of the `linear` ones, the last of the attention is its
    output projection, and the last of the MLP its output matrix (`plan.memory.activations`, `plan.cost.flops`)."""
    sparse_block: tuple[TensorTemplate, ...] = ()
    """A block with a mixture of experts, if the layout has one."""
    final_norm: tuple[TensorTemplate, ...]
    pooler: tuple[TensorTemplate, ...] = ()
    """Tensors between the last block and the classifier; new (and trained with the classifier) if they are not stored."""
    pooler_is_new: bool = False
    """True if base checkpoints lack the pooler, so that it is not counted if there is only a config."""
    head_weight: str
    head_bias: str = ""
    classifier_weight: str
    classifier_bias: str = ""
    attention: Literal["fused", "eager"] = "fused"
    norm: Literal["rms", "layer"]
    mlp: Literal["gated", "plain"]
    activation_key: str = "hidden_act"
    defaults: Mapping[str, object]
    """Defaults of the transformers config class for keys that config.json omits."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SIZE_KEYS)
    """Size name -> its config key, and the other spellings that transformers accepts for it."""
    otherwise: Mapping[str, str] = field(default_factory=lambda: {"kv_heads": "heads"})
    """Size name -> its value in terms of other sizes, if config and default say null."""
    dropout: Mapping[str, float] = field(default_factory=dict[str, float])
    """Default dropout rates of the transformers config class, by config key."""
    unused_positions: int = 0
    """Number of `positions` that are never assigned to a token."""
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    """Config keys that must have this value: another value means another layout."""
    stored_as: Mapping[str, str] = field(default_factory=dict[str, str])
    """Parameter name -> its name in the files, where that differs."""
    ignored: tuple[str, ...] = ()
    """fnmatch patterns of stored tensors that are not parameters, or belong to the head of another task."""
    plan_only: str = ""
    """Why such a base can be planned for but not trained; empty if it can be trained."""
    plan_only_if: Mapping[str, str] = field(default_factory=dict[str, str])
    """Config key -> why a base where it is neither null nor false cannot be trained."""

    @property
    def block_prefix(self) -> str:
        return self.blocks_module + ".{}."


def weight(name: str, *shape: str) -> TensorTemplate:
    """Return the template of a linear layer's weight, [out, in]."""
    return TensorTemplate(f"{name}.weight", shape, linear=True)


def bias(name: str, size: str, when: str | None = None) -> TensorTemplate:
    return TensorTemplate(f"{name}.bias", (size,), when=when)


def norm(name: str, size: str = "hidden", when: str | None = None) -> TensorTemplate:
    return TensorTemplate(f"{name}.weight", (size,), when=when)


def layer_norm(name: str, size: str = "hidden", when: str | None = None) -> tuple[TensorTemplate, ...]:
    """Return the templates of a layer norm: weight and bias."""
    return (norm(name, size, when), bias(name, size, when))


def dense(name: str, out: str, into: str, when: str | None = None) -> tuple[TensorTemplate, ...]:
    """Return the templates of a linear layer with a bias; `when` applies to the bias only."""
    return (weight(name, out, into), bias(name, out, when))


def axis_size(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate the size of an axis, such as `heads*head_dim`, `3*hidden` or `hidden+2*kv_heads*head_dim`."""
    total = 0
    for product in expression.split("+"):
        value = 1
        for factor in product.split("*"):
            value *= int(factor) if factor.isdigit() else sizes[factor]
        total += value
    return total


def present(templates: tuple[TensorTemplate, ...], flags: Mapping[str, object]) -> tuple[TensorTemplate, ...]:
    """Return the templates of the tensors that exist under this config."""
    return tuple(template for template in templates if template.when is None or flags.get(template.when) is True)
