"""The model layouts that are known, as data: a new layout is a new row of `LAYOUTS`.

A row says which tensors a model of one `model_type` has and how their shapes follow from its config.json.
Names and shapes are those of the transformers classes `AutoModelForCausalLM` (decoders) and
`AutoModelForSequenceClassification` (encoders); a test builds both and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TensorTemplate:
    """One tensor of a layout.

    `name` is relative to its block (or complete, outside the blocks). Each axis of `shape` is a sum of
    products of numbers and size names (`heads*head_dim`, `3*hidden`). `linear` marks a matrix product:
    what LoRA adapts and quantization compresses. A tensor with `when` exists only where that config key is true.
    """

    name: str
    shape: tuple[str, ...]
    linear: bool = False
    when: str | None = None


@dataclass(frozen=True)
class Layout:
    """How models of one type are built."""

    model_type: str
    kind: Literal["decoder", "encoder"]
    backbone: str
    """The attribute that returns hidden states; also the prefix that some checkpoints leave out."""
    blocks_module: str
    embeddings: tuple[TensorTemplate, ...]
    block: tuple[TensorTemplate, ...]
    final_norm: tuple[TensorTemplate, ...]
    pooler: tuple[TensorTemplate, ...]
    """Between the last block and the classifier; new (and learning with the classifier) where it is not stored."""
    head_weight: str
    classifier_weight: str
    classifier_bias: str | None
    defaults: Mapping[str, int | bool]
    """What the transformers config class assumes for a key that config.json leaves out."""
    ignored: tuple[str, ...]
    """fnmatch patterns of stored tensors that are no parameters, or belong to the head of another task."""
    keys: Mapping[str, str] = field(default_factory=lambda: SIZE_KEYS)
    """Size name -> config key."""

    @property
    def block_prefix(self) -> str:
        return self.blocks_module + ".{}."


SIZE_KEYS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
}


def _weight(name: str, *shape: str) -> TensorTemplate:
    return TensorTemplate(f"{name}.weight", shape, linear=True)


def _bias(name: str, size: str, when: str | None = None) -> TensorTemplate:
    return TensorTemplate(f"{name}.bias", (size,), when=when)


def _norm(name: str, size: str = "hidden") -> TensorTemplate:
    return TensorTemplate(f"{name}.weight", (size,))


def _layer_norm(name: str) -> tuple[TensorTemplate, ...]:
    return (_norm(name), _bias(name, "hidden"))


def _dense(name: str, out: str, into: str) -> tuple[TensorTemplate, ...]:
    return (_weight(name, out, into), _bias(name, out))


Q, KV = "heads*head_dim", "kv_heads*head_dim"
LLAMA_ATTENTION = (
    _weight("self_attn.q_proj", Q, "hidden"),
    _weight("self_attn.k_proj", KV, "hidden"),
    _weight("self_attn.v_proj", KV, "hidden"),
    _weight("self_attn.o_proj", "hidden", Q),
)
LLAMA_MLP = (
    _weight("mlp.gate_proj", "intermediate", "hidden"),
    _weight("mlp.up_proj", "intermediate", "hidden"),
    _weight("mlp.down_proj", "hidden", "intermediate"),
)
LLAMA_NORMS = (_norm("input_layernorm"), _norm("post_attention_layernorm"))
QKV_BIAS = (_bias("self_attn.q_proj", Q), _bias("self_attn.k_proj", KV), _bias("self_attn.v_proj", KV))
OPTIONAL_ATTENTION_BIAS = (
    _bias("self_attn.q_proj", Q, "attention_bias"),
    _bias("self_attn.k_proj", KV, "attention_bias"),
    _bias("self_attn.v_proj", KV, "attention_bias"),
    _bias("self_attn.o_proj", "hidden", "attention_bias"),
)
OPTIONAL_MLP_BIAS = (
    _bias("mlp.gate_proj", "intermediate", "mlp_bias"),
    _bias("mlp.up_proj", "intermediate", "mlp_bias"),
    _bias("mlp.down_proj", "hidden", "mlp_bias"),
)
QK_NORMS = (_norm("self_attn.q_norm", "head_dim"), _norm("self_attn.k_norm", "head_dim"))


def _llama_like(model_type: str, extra: tuple[TensorTemplate, ...] = (), **defaults: int | bool) -> Layout:
    """A decoder with Llama's skeleton: RMS norms, gated MLP, separate query, key and value projections."""
    return Layout(
        model_type=model_type,
        kind="decoder",
        backbone="model",
        blocks_module="model.layers",
        embeddings=(TensorTemplate("model.embed_tokens.weight", ("vocab", "hidden")),),
        block=LLAMA_ATTENTION + LLAMA_MLP + LLAMA_NORMS + extra,
        final_norm=(_norm("model.norm"),),
        pooler=(),
        head_weight="lm_head.weight",
        classifier_weight="score.weight",
        classifier_bias=None,
        defaults={"tie_word_embeddings": False, **defaults},
        ignored=("*rotary_emb.inv_freq", "score.*"),
    )


BERT = Layout(
    model_type="bert",
    kind="encoder",
    backbone="bert",
    blocks_module="bert.encoder.layer",
    embeddings=(
        TensorTemplate("bert.embeddings.word_embeddings.weight", ("vocab", "hidden")),
        TensorTemplate("bert.embeddings.position_embeddings.weight", ("positions", "hidden")),
        TensorTemplate("bert.embeddings.token_type_embeddings.weight", ("token_types", "hidden")),
        *_layer_norm("bert.embeddings.LayerNorm"),
    ),
    block=(
        *_dense("attention.self.query", "hidden", "hidden"),
        *_dense("attention.self.key", "hidden", "hidden"),
        *_dense("attention.self.value", "hidden", "hidden"),
        *_dense("attention.output.dense", "hidden", "hidden"),
        *_layer_norm("attention.output.LayerNorm"),
        *_dense("intermediate.dense", "intermediate", "hidden"),
        *_dense("output.dense", "hidden", "intermediate"),
        *_layer_norm("output.LayerNorm"),
    ),
    final_norm=(),
    pooler=_dense("bert.pooler.dense", "hidden", "hidden"),
    head_weight="cls.predictions.decoder.weight",
    classifier_weight="classifier.weight",
    classifier_bias="classifier.bias",
    defaults={"tie_word_embeddings": True, "type_vocab_size": 2, "max_position_embeddings": 512},
    ignored=("cls.*", "classifier.*", "*embeddings.position_ids"),
)

LAYOUTS: dict[str, Layout] = {
    layout.model_type: layout
    for layout in (
        _llama_like("llama", OPTIONAL_ATTENTION_BIAS + OPTIONAL_MLP_BIAS, max_position_embeddings=2048),
        _llama_like("mistral", num_key_value_heads=8, max_position_embeddings=131072),
        _llama_like("qwen2", QKV_BIAS, num_key_value_heads=32, max_position_embeddings=32768),
        _llama_like(
            "qwen3", OPTIONAL_ATTENTION_BIAS + QK_NORMS, num_key_value_heads=32, head_dim=128, max_position_embeddings=32768
        ),
        BERT,
    )
}


def known_layouts() -> tuple[str, ...]:
    """The values of `model_type` in config.json that can be used as a base."""
    return tuple(sorted(LAYOUTS))


def axis_size(expression: str, sizes: Mapping[str, int]) -> int:
    """`heads*head_dim`, `3*hidden`, `hidden+2*kv_heads*head_dim` -> a number."""
    total = 0
    for product in expression.split("+"):
        value = 1
        for factor in product.split("*"):
            value *= int(factor) if factor.isdigit() else sizes[factor]
        total += value
    return total


def present(templates: tuple[TensorTemplate, ...], flags: Mapping[str, object]) -> tuple[TensorTemplate, ...]:
    """The templates that exist under this config."""
    return tuple(template for template in templates if template.when is None or flags.get(template.when) is True)
