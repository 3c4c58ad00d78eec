"""Decoders with Llama's skeleton: RMS norms, a gated MLP, rotary positions; dense, or with a mixture of experts."""

from __future__ import annotations

from typing import Any

from orchestrator.anatomy.layouts.template import GROUPED_KEYS, Layout, TensorTemplate, bias, norm, weight

Q, KV = "heads*head_dim", "kv_heads*head_dim"
ATTENTION = (
    weight("self_attn.q_proj", Q, "hidden"),
    weight("self_attn.k_proj", KV, "hidden"),
    weight("self_attn.v_proj", KV, "hidden"),
    weight("self_attn.o_proj", "hidden", Q),
)
MLP = (
    weight("mlp.gate_proj", "intermediate", "hidden"),
    weight("mlp.up_proj", "intermediate", "hidden"),
    weight("mlp.down_proj", "hidden", "intermediate"),
)
NORMS = (norm("input_layernorm"), norm("post_attention_layernorm"))
FOUR_NORMS = (*NORMS, norm("pre_feedforward_layernorm"), norm("post_feedforward_layernorm"))
QK_NORMS = (norm("self_attn.q_norm", "head_dim"), norm("self_attn.k_norm", "head_dim"))
QKV_BIAS = (bias("self_attn.q_proj", Q), bias("self_attn.k_proj", KV), bias("self_attn.v_proj", KV))
OPTIONAL_QKV_BIAS = (
    bias("self_attn.q_proj", Q, "qkv_bias"),
    bias("self_attn.k_proj", KV, "qkv_bias"),
    bias("self_attn.v_proj", KV, "qkv_bias"),
)
OPTIONAL_ATTENTION_BIAS = (
    bias("self_attn.q_proj", Q, "attention_bias"),
    bias("self_attn.k_proj", KV, "attention_bias"),
    bias("self_attn.v_proj", KV, "attention_bias"),
    bias("self_attn.o_proj", "hidden", "attention_bias"),
)
OPTIONAL_MLP_BIAS = (
    bias("mlp.gate_proj", "intermediate", "mlp_bias"),
    bias("mlp.up_proj", "intermediate", "mlp_bias"),
    bias("mlp.down_proj", "hidden", "mlp_bias"),
)
PHI3_LINEARS = (
    weight("self_attn.qkv_proj", "heads*head_dim+2*kv_heads*head_dim", "hidden"),
    weight("self_attn.o_proj", "hidden", Q),
    weight("mlp.gate_up_proj", "2*intermediate", "hidden"),
    weight("mlp.down_proj", "hidden", "intermediate"),
)

ROUTED = (
    TensorTemplate("mlp.gate.weight", ("experts", "hidden"), router=True),
    TensorTemplate("mlp.experts.gate_up_proj", ("experts", "2*expert_intermediate", "hidden"), stacked=True),
    TensorTemplate("mlp.experts.down_proj", ("experts", "hidden", "expert_intermediate"), stacked=True),
)
"""The router is a bare parameter, not a linear layer: LoRA does not adapt it and bitsandbytes does not quantize it."""
SHARED_EXPERT = (
    weight("mlp.shared_expert.gate_proj", "shared_intermediate", "hidden"),
    weight("mlp.shared_expert.up_proj", "shared_intermediate", "hidden"),
    weight("mlp.shared_expert.down_proj", "hidden", "shared_intermediate"),
    weight("mlp.shared_expert_gate", "1", "hidden"),
)
QWEN_MOE_KEYS = {
    **GROUPED_KEYS,
    "expert_intermediate": ("moe_intermediate_size",),
    "experts_per_token": ("num_experts_per_tok",),
}
SPARSE_EVERYWHERE = {"decoder_sparse_step": 1, "mlp_only_layers": ()}

STACKED_EXPERTS = (
    "transformers stacks the routed experts into one parameter, and the checkpoint stores each under a name of its own, "
    "which training and merging here do not map"
)
NO_SDPA = "transformers has no sdpa attention for it, and training here neither uses another nor caps the logits as it does"
CAPPED_LOGITS = "its final_logit_softcapping caps the logits after the output projection, which training here does not"
BIDIRECTIONAL = "its use_bidirectional_attention lets tokens see the ones to come"


def llama_like(
    model_type: str,
    block: tuple[TensorTemplate, ...],
    defaults: dict[str, object],
    **changes: Any,
) -> Layout:
    """Return a row with the fields that these layouts share; `changes` are fields of `Layout` to override."""
    shared: dict[str, Any] = {
        "kind": "decoder",
        "backbone": "model",
        "blocks_module": "model.layers",
        "embeddings": (TensorTemplate("model.embed_tokens.weight", ("vocab", "hidden")),),
        "final_norm": (norm("model.norm"),),
        "head_weight": "lm_head.weight",
        "classifier_weight": "score.weight",
        "norm": "rms",
        "mlp": "gated",
        "keys": GROUPED_KEYS,
        "ignored": ("*rotary_emb.inv_freq", "score.*"),
    }
    defaults = {"tie_word_embeddings": False, "hidden_act": "silu", **defaults}
    return Layout(model_type=model_type, block=block, defaults=defaults, **{**shared, **changes})


GEMMA_DEFAULTS: dict[str, object] = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
DENSE = (
    llama_like(
        "llama",
        ATTENTION + MLP + NORMS + OPTIONAL_ATTENTION_BIAS + OPTIONAL_MLP_BIAS,
        {"max_position_embeddings": 2048},
    ),
    llama_like("mistral", ATTENTION + MLP + NORMS, {"num_key_value_heads": 8, "max_position_embeddings": 131072}),
    llama_like("qwen2", ATTENTION + MLP + NORMS + QKV_BIAS, {"num_key_value_heads": 32, "max_position_embeddings": 32768}),
    llama_like(
        "qwen3",
        ATTENTION + MLP + NORMS + OPTIONAL_ATTENTION_BIAS + QK_NORMS,
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    ),
    llama_like(
        "gemma",
        ATTENTION + MLP + NORMS + OPTIONAL_ATTENTION_BIAS,
        {**GEMMA_DEFAULTS, "num_key_value_heads": 16, "max_position_embeddings": 8192},
        plan_only_if={"use_bidirectional_attention": BIDIRECTIONAL},
    ),
    llama_like(
        "gemma2",
        ATTENTION + MLP + FOUR_NORMS + OPTIONAL_ATTENTION_BIAS,
        {**GEMMA_DEFAULTS, "num_key_value_heads": 4, "max_position_embeddings": 8192},
        activation_key="hidden_activation",
        plan_only=NO_SDPA,
        attention="eager",
    ),
    llama_like(
        "gemma3_text",
        ATTENTION + MLP + FOUR_NORMS + OPTIONAL_ATTENTION_BIAS + QK_NORMS,
        {**GEMMA_DEFAULTS, "num_key_value_heads": 4, "max_position_embeddings": 131072},
        activation_key="hidden_activation",
        plan_only_if={
            "final_logit_softcapping": CAPPED_LOGITS,
            "attn_logit_softcapping": NO_SDPA,
            "use_bidirectional_attention": BIDIRECTIONAL,
        },
    ),
    llama_like("phi3", PHI3_LINEARS + NORMS, {"max_position_embeddings": 4096}),
)
EXPERTS = (
    llama_like(
        "mixtral",
        ATTENTION + MLP + NORMS,
        {
            **SPARSE_EVERYWHERE,
            "router_aux_loss_coef": 0.001,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        sparse_block=ATTENTION + ROUTED + NORMS,
        keys={
            **GROUPED_KEYS,
            "experts": ("num_local_experts", "num_experts"),
            "expert_intermediate": ("intermediate_size",),
            "experts_per_token": ("num_experts_per_tok",),
        },
        plan_only=STACKED_EXPERTS,
    ),
    llama_like(
        "qwen2_moe",
        ATTENTION + OPTIONAL_QKV_BIAS + MLP + NORMS,
        {
            **SPARSE_EVERYWHERE,
            "router_aux_loss_coef": 0.001,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        sparse_block=ATTENTION + OPTIONAL_QKV_BIAS + ROUTED + SHARED_EXPERT + NORMS,
        keys={
            **QWEN_MOE_KEYS,
            "experts": ("num_experts",),
            "shared_intermediate": ("shared_expert_intermediate_size",),
        },
        plan_only=STACKED_EXPERTS,
    ),
    llama_like(
        "qwen3_moe",
        ATTENTION + OPTIONAL_ATTENTION_BIAS + QK_NORMS + MLP + NORMS,
        {
            **SPARSE_EVERYWHERE,
            "router_aux_loss_coef": 0.001,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        sparse_block=ATTENTION + OPTIONAL_ATTENTION_BIAS + QK_NORMS + ROUTED + NORMS,
        keys={**QWEN_MOE_KEYS, "experts": ("num_local_experts", "num_experts")},
        plan_only=STACKED_EXPERTS,
    ),
)
