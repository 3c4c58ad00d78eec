"""The types of the matrix, each with a published base of it.

The config of a type is the default one of its transformers class, which is that of a published base or near it; `CHANGES` has what
a default leaves out.
"""

from __future__ import annotations

from typing import Any

DENSE = {
    "llama": "meta-llama/Llama-3.1-8B",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "ministral": "mistralai/Ministral-8B-Instruct-2410",
    "ministral3": "mistralai/Ministral-3-8B-Base-2512",
    "qwen2": "Qwen/Qwen2.5-7B",
    "qwen3": "Qwen/Qwen3-8B",
    "gemma": "google/gemma-7b",
    "gemma2": "google/gemma-2-9b",
    "gemma3_text": "google/gemma-3-1b-pt",
    "gemma3n_text": "google/gemma-3n-E4B",
    "gemma4_text": "google/gemma-4-e2b-it",
    "vaultgemma": "google/vaultgemma-1b",
    "phi": "microsoft/phi-2",
    "phi3": "microsoft/Phi-4-mini-instruct",
    "gpt2": "openai-community/gpt2",
    "openai-gpt": "openai-community/openai-gpt",
    "gptj": "EleutherAI/gpt-j-6B",
    "gpt_neo": "EleutherAI/gpt-neo-1.3B",
    "gpt_neox": "EleutherAI/pythia-6.9b",
    "gpt_neox_japanese": "abeja/gpt-neox-japanese-2.7b",
    "gpt_bigcode": "bigcode/gpt_bigcode-santacoder",
    "starcoder2": "bigcode/starcoder2-7b",
    "codegen": "Salesforce/codegen-2B-mono",
    "opt": "facebook/opt-1.3b",
    "bloom": "bigscience/bloom-7b1",
    "mpt": "mosaicml/mpt-7b",
    "falcon": "tiiuae/falcon-7b",
    "xglm": "facebook/xglm-564M",
    "biogpt": "microsoft/biogpt",
    "ctrl": "Salesforce/ctrl",
    "olmo": "allenai/OLMo-7B-hf",
    "olmo2": "allenai/OLMo-2-1124-7B",
    "olmo3": "allenai/Olmo-3-7B-Instruct",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "stablelm": "stabilityai/stablelm-3b-4e1t",
    "granite": "ibm-granite/granite-3.3-8b-base",
    "cohere": "CohereForAI/c4ai-command-r-v01",
    "cohere2": "CohereForAI/c4ai-command-r7b-12-2024",
    "glm": "THUDM/glm-4-9b-chat",
    "glm4": "THUDM/GLM-4-9B-0414",
    "internlm3": "internlm/internlm3-8b-instruct",
    "ernie4_5": "baidu/ERNIE-4.5-0.3B-PT",
    "hunyuan_v1_dense": "tencent/Hunyuan-7B-Instruct",
    "exaone4": "LGAI-EXAONE/EXAONE-4.0-32B",
    "seed_oss": "ByteDance-Seed/Seed-OSS-36B-Instruct",
    "apertus": "swiss-ai/Apertus-8B-Instruct-2509",
    "arcee": "arcee-ai/AFM-4.5B",
    "helium": "kyutai/helium-1-preview",
    "nemotron": "nvidia/Minitron-4B-Base",
    "persimmon": "adept/persimmon-8b-base",
    "diffllama": "kajuma/DiffLlama-0.3B-handcut",
    "minicpm3": "openbmb/MiniCPM3-4B",
    "nanochat": "karpathy/nanochat-d32",
    "bitnet": "microsoft/bitnet-b1.58-2B-4T",
    "modernbert-decoder": "jhu-clsp/ettin-decoder-150m",
}
"""Dense decoders."""
EXPERTS = {
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen2_moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B-Base",
    "phimoe": "microsoft/Phi-3.5-MoE-instruct",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "flex_olmo": "allenai/FlexOlmo-7x7B-1T",
    "granitemoe": "ibm-granite/granite-3.1-3b-a800m-base",
    "granitemoeshared": "ibm-granite/granite-4.0-tiny",
    "gpt_oss": "openai/gpt-oss-20b",
    "minimax_m2": "MiniMaxAI/MiniMax-M2",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek_v3": "deepseek-ai/DeepSeek-V3",
    "glm4_moe": "zai-org/GLM-4.5",
    "ernie4_5_moe": "baidu/ERNIE-4.5-21B-A3B-PT",
    "hunyuan_v1_moe": "tencent/Hunyuan-A13B-Instruct",
    "dots1": "rednote-hilab/dots.llm1.base",
    "jetmoe": "jetmoe/jetmoe-8b",
    "dbrx": "databricks/dbrx-base",
    "llama4_text": "meta-llama/Llama-4-Scout-17B-16E",
    "longcat_flash": "meituan-longcat/LongCat-Flash-Chat",
}
"""Decoders with routed experts."""
HYBRIDS = {
    "mamba": "state-spaces/mamba-2.8b-hf",
    "mamba2": "mistralai/Mamba-Codestral-7B-v0.1",
    "falcon_mamba": "tiiuae/falcon-mamba-7b",
    "falcon_h1": "tiiuae/Falcon-H1-1.5B-Deep-Instruct",
    "jamba": "ai21labs/Jamba-v0.1",
    "bamba": "ibm-fms/Bamba-9.8b-2.2T-hf",
    "zamba": "Zyphra/Zamba-7B-v1",
    "zamba2": "Zyphra/Zamba2-2.7B",
    "nemotron_h": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-small",
    "recurrent_gemma": "google/recurrentgemma-2b",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3_5_text": "Qwen/Qwen3.5-27B",
    "qwen3_5_moe_text": "Qwen/Qwen3.5-35B-A3B",
    "olmo_hybrid": "allenai/Olmo-Hybrid-7B",
    "lfm2": "LiquidAI/LFM2-1.2B",
    "minimax": "MiniMaxAI/MiniMax-Text-01-hf",
    "rwkv": "RWKV/rwkv-4-169m-pile",
    "xlstm": "NX-AI/xLSTM-7b",
}
"""Decoders with blocks of other kinds than attention."""
WRAPPERS = {
    "gemma3": "google/gemma-3-4b-it",
    "gemma3n": "google/gemma-3n-E4B",
    "gemma4": "google/gemma-4-e2b-it",
    "mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_5": "Qwen/Qwen3.5-27B",
    "llama4": "meta-llama/Llama-4-Scout-17B-16E",
    "mllama": "meta-llama/Llama-3.2-11B-Vision",
    "paligemma": "google/paligemma-3b-pt-224",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
    "glm4v": "zai-org/GLM-4.1V-9B-Thinking",
}
"""Text models in checkpoints with vision or audio around them."""
ENCODERS = {
    "bert": "google-bert/bert-base-uncased",
    "roberta": "FacebookAI/roberta-base",
    "xlm-roberta": "FacebookAI/xlm-roberta-base",
    "distilbert": "distilbert/distilbert-base-uncased",
    "camembert": "almanach/camembert-base",
    "electra": "google/electra-small-discriminator",
    "deberta": "microsoft/deberta-base",
    "deberta-v2": "microsoft/deberta-v3-base",
    "modernbert": "answerdotai/ModernBERT-base",
    "albert": "albert/albert-base-v2",
    "mpnet": "microsoft/mpnet-base",
    "esm": "facebook/esm2_t33_650M_UR50D",
    "eurobert": "EuroBERT/EuroBERT-210m",
    "nomic_bert": "nomic-ai/nomic-embed-text-v1.5",
    "megatron-bert": "nvidia/megatron-bert-uncased-345m",
    "rembert": "google/rembert",
    "canine": "google/canine-s",
}
"""Encoders, for `classify`."""
ENCODER_DECODERS = {
    "t5": "google-t5/t5-small",
    "mt5": "google/mt5-small",
    "bart": "facebook/bart-large",
    "mbart": "facebook/mbart-large-cc25",
}
GROUPS = {
    "dense": DENSE,
    "experts": EXPERTS,
    "hybrid": HYBRIDS,
    "wrapper": WRAPPERS,
    "encoder": ENCODERS,
    "encoder-decoder": ENCODER_DECODERS,
}
TITLES = {
    "dense": "Dense decoders",
    "experts": "Mixtures of experts",
    "hybrid": "State-space, recurrent and linear-attention blocks",
    "wrapper": "Text models inside vision or audio checkpoints",
    "encoder": "Encoders (`classify`)",
    "encoder-decoder": "Encoder-decoders",
}
PUBLISHED = {model_type: base for bases in GROUPS.values() for model_type, base in bases.items()}

CHANGES: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "ministral": {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "falcon": {"num_kv_heads": 1, "multi_query": True, "new_decoder_architecture": False},
    "esm": {
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
        "token_dropout": False,
    },
    "deepseek_v3": {"num_nextn_predict_layers": 0},
}

QUICK = (
    "llama",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon",
    "bloom",
    "mpt",
    "opt",
    "cohere2",
    "olmo2",
    "starcoder2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "mamba2",
    "jamba",
    "qwen3_next",
    "gemma3",
    "qwen2_vl",
    "llama4_text",
    "bert",
    "deberta-v2",
    "modernbert",
    "t5",
)
"""A quarter of the types, with some of every group."""
SHARDED = ("qwen3", "bloom", "gpt2", "qwen3_moe", "mamba2", "gemma3", "bert")
"""One type of each kind, which is trained on two ranks too."""


def group_of(model_type: str) -> str:
    return next(name for name, bases in GROUPS.items() if model_type in bases)
