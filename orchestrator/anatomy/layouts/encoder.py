"""Encoders: BERT and similar models, and the vision transformer."""

from __future__ import annotations

from orchestrator.anatomy.layouts.template import SIZE_KEYS, Layout, TensorTemplate, bias, dense, layer_norm, weight

BERT_BLOCK = (
    *dense("attention.self.query", "hidden", "hidden"),
    *dense("attention.self.key", "hidden", "hidden"),
    *dense("attention.self.value", "hidden", "hidden"),
    *dense("attention.output.dense", "hidden", "hidden"),
    *layer_norm("attention.output.LayerNorm"),
    *dense("intermediate.dense", "intermediate", "hidden"),
    *dense("output.dense", "hidden", "intermediate"),
    *layer_norm("output.LayerNorm"),
)
BERT_KEYS = {**SIZE_KEYS, "token_types": ("type_vocab_size",)}
BERT_DEFAULTS: dict[str, object] = {
    "tie_word_embeddings": True,
    "type_vocab_size": 2,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
}


def bert_embeddings(prefix: str) -> tuple[TensorTemplate, ...]:
    return (
        TensorTemplate(f"{prefix}.embeddings.word_embeddings.weight", ("vocab", "hidden")),
        TensorTemplate(f"{prefix}.embeddings.position_embeddings.weight", ("positions", "hidden")),
        TensorTemplate(f"{prefix}.embeddings.token_type_embeddings.weight", ("token_types", "hidden")),
        *layer_norm(f"{prefix}.embeddings.LayerNorm"),
    )


BERT_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
BERT = Layout(
    model_type="bert",
    dropout=BERT_DROPOUT,
    kind="encoder",
    backbone="bert",
    blocks_module="bert.encoder.layer",
    embeddings=bert_embeddings("bert"),
    block=BERT_BLOCK,
    final_norm=(),
    pooler=dense("bert.pooler.dense", "hidden", "hidden"),
    head_weight="cls.predictions.decoder.weight",
    classifier_weight="classifier.weight",
    classifier_bias="classifier.bias",
    norm="layer",
    mlp="plain",
    defaults=BERT_DEFAULTS,
    keys=BERT_KEYS,
    fixed={"add_cross_attention": False},
    ignored=("cls.*", "classifier.*", "*embeddings.position_ids"),
)
ROBERTA = Layout(
    model_type="roberta",
    dropout=BERT_DROPOUT,
    kind="encoder",
    backbone="roberta",
    blocks_module="roberta.encoder.layer",
    embeddings=bert_embeddings("roberta"),
    block=BERT_BLOCK,
    final_norm=(),
    pooler=dense("classifier.dense", "hidden", "hidden"),
    pooler_is_new=True,
    head_weight="lm_head.decoder.weight",
    classifier_weight="classifier.out_proj.weight",
    classifier_bias="classifier.out_proj.bias",
    norm="layer",
    mlp="plain",
    defaults=BERT_DEFAULTS,
    keys=BERT_KEYS,
    unused_positions=2,
    fixed={"add_cross_attention": False},
    ignored=("lm_head.*", "classifier.out_proj.*", "roberta.pooler.*", "pooler.*", "*embeddings.position_ids"),
)
DISTILBERT = Layout(
    model_type="distilbert",
    dropout={"dropout": 0.1, "attention_dropout": 0.1},
    kind="encoder",
    backbone="distilbert",
    blocks_module="distilbert.transformer.layer",
    embeddings=(
        TensorTemplate("distilbert.embeddings.word_embeddings.weight", ("vocab", "hidden")),
        TensorTemplate("distilbert.embeddings.position_embeddings.weight", ("positions", "hidden")),
        *layer_norm("distilbert.embeddings.LayerNorm"),
    ),
    block=(
        *dense("attention.q_lin", "hidden", "hidden"),
        *dense("attention.k_lin", "hidden", "hidden"),
        *dense("attention.v_lin", "hidden", "hidden"),
        *dense("attention.out_lin", "hidden", "hidden"),
        *layer_norm("sa_layer_norm"),
        *dense("ffn.lin1", "intermediate", "hidden"),
        *dense("ffn.lin2", "hidden", "intermediate"),
        *layer_norm("output_layer_norm"),
    ),
    final_norm=(),
    pooler=dense("pre_classifier", "hidden", "hidden"),
    pooler_is_new=True,
    head_weight="vocab_projector.weight",
    classifier_weight="classifier.weight",
    classifier_bias="classifier.bias",
    norm="layer",
    mlp="plain",
    activation_key="activation",
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 512, "hidden_dim": 3072, "activation": "gelu"},
    keys={
        **SIZE_KEYS,
        "hidden": ("dim", "hidden_size"),
        "intermediate": ("hidden_dim",),
        "blocks": ("n_layers", "num_hidden_layers"),
        "heads": ("n_heads", "num_attention_heads"),
    },
    ignored=("vocab_*", "qa_outputs.*", "classifier.*"),
)
VIT = Layout(
    model_type="vit",
    kind="encoder",
    backbone="vit",
    blocks_module="vit.layers",
    embeddings=(
        TensorTemplate("vit.embeddings.cls_token", ("1", "1", "hidden")),
        TensorTemplate("vit.embeddings.position_embeddings", ("1", "positions", "hidden")),
        TensorTemplate("vit.embeddings.patch_embeddings.projection.weight", ("hidden", "channels", "patch", "patch")),
        bias("vit.embeddings.patch_embeddings.projection", "hidden"),
    ),
    block=(
        *dense("attention.q_proj", "hidden", "hidden", "qkv_bias"),
        *dense("attention.k_proj", "hidden", "hidden", "qkv_bias"),
        *dense("attention.v_proj", "hidden", "hidden", "qkv_bias"),
        weight("attention.o_proj", "hidden", "hidden"),
        bias("attention.o_proj", "hidden"),
        *layer_norm("layernorm_before"),
        *layer_norm("layernorm_after"),
        *dense("mlp.fc1", "intermediate", "hidden"),
        *dense("mlp.fc2", "hidden", "intermediate"),
    ),
    final_norm=layer_norm("vit.layernorm"),
    head_weight="",
    classifier_weight="classifier.weight",
    classifier_bias="classifier.bias",
    norm="layer",
    mlp="plain",
    defaults={
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
    },
    keys={
        "hidden": ("hidden_size",),
        "intermediate": ("intermediate_size",),
        "blocks": ("num_hidden_layers",),
        "heads": ("num_attention_heads",),
        "image": ("image_size",),
        "patch": ("patch_size",),
        "channels": ("num_channels",),
    },
    ignored=("classifier.*", "*pooler.*"),
    plan_only="it reads images, and the data here are texts",
)
"""The vision transformer. It has one position for each patch of the image and one for the class token."""
ENCODERS = (BERT, ROBERTA, DISTILBERT, VIT)
