"""Config values of real models, and how many parameters their publishers say they have.

`total` is the count that the model's page on huggingface.co gives for its safetensors, unless `source` names another.
The configs keep the keys that shapes follow from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestrator.anatomy import ModelAnatomy, known_layouts, read_anatomy

from .bases import row_of, write_base


class Published(NamedTuple):
    model: str
    total: int
    config: dict[str, Any]
    source: str = ""


def config_of(model_type: str, vocab: int, hidden: int, inner: int, blocks: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        **more,
    }


GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "word_embed_proj_dim": 2048,
    "max_position_embeddings": 2048,
}
DISTILBERT = {"model_type": "distilbert", "vocab_size": 30522, "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12}
VIT = {
    "model_type": "vit",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
MIXTRAL = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_MOE = {
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "decoder_sparse_step": 1,
}
QWEN3_MOE = {
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS = [
    Published(
        "meta-llama/Llama-3.2-1B",
        1_235_814_400,
        config_of("llama", 128256, 2048, 8192, 16, 32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    ),
    Published("meta-llama/Llama-3.1-8B", 8_030_261_248, config_of("llama", 128256, 4096, 14336, 32, 32, num_key_value_heads=8)),
    Published("meta-llama/Llama-3.1-70B", 70_553_706_496, config_of("llama", 128256, 8192, 28672, 80, 64, num_key_value_heads=8)),
    Published("Qwen/Qwen2.5-7B", 7_615_616_512, config_of("qwen2", 152064, 3584, 18944, 28, 28, num_key_value_heads=4)),
    Published(
        "Qwen/Qwen3-8B", 8_190_735_360, config_of("qwen3", 151936, 4096, 12288, 36, 32, num_key_value_heads=8, head_dim=128)
    ),
    Published(
        "mistralai/Mistral-7B-v0.1", 7_241_732_096, config_of("mistral", 32000, 4096, 14336, 32, 32, num_key_value_heads=8)
    ),
    Published("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, config_of("mixtral", 32000, 4096, 14336, 32, 32, **MIXTRAL)),
    Published("Qwen/Qwen1.5-MoE-A2.7B", 14_315_784_192, config_of("qwen2_moe", 151936, 2048, 5632, 24, 16, **QWEN_MOE)),
    Published("Qwen/Qwen3-30B-A3B", 30_532_122_624, config_of("qwen3_moe", 151936, 2048, 6144, 48, 32, **QWEN3_MOE)),
    Published(
        "google/gemma-7b", 8_537_680_896, config_of("gemma", 256000, 3072, 24576, 28, 16, num_key_value_heads=16, head_dim=256)
    ),
    Published(
        "google/gemma-2-2b", 2_614_341_888, config_of("gemma2", 256000, 2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256)
    ),
    Published(
        "google/gemma-3-1b-pt",
        999_885_952,
        config_of("gemma3_text", 262144, 1152, 6912, 26, 4, num_key_value_heads=1, head_dim=256),
    ),
    Published("microsoft/phi-2", 2_779_683_840, config_of("phi", 51200, 2560, 10240, 32, 32)),
    Published(
        "microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, config_of("phi3", 32064, 3072, 8192, 32, 32, num_key_value_heads=32)
    ),
    Published("openai-community/gpt2", 124_439_808, GPT2, "GPT2LMHeadModel.num_parameters(), the head tied"),
    Published("EleutherAI/pythia-6.9b", 6_857_302_016, config_of("gpt_neox", 50432, 4096, 16384, 32, 32), "its model card"),
    Published("facebook/opt-1.3b", 1_315_758_080, OPT, "OPTForCausalLM.num_parameters(), the head tied"),
    Published(
        "google-bert/bert-base-uncased", 109_482_240, config_of("bert", 30522, 768, 3072, 12, 12), "BertModel, with pooler"
    ),
    Published(
        "FacebookAI/roberta-base",
        124_645_632,
        config_of("roberta", 50265, 768, 3072, 12, 12, max_position_embeddings=514, type_vocab_size=1),
        "RobertaModel; its pooler is as large as the layer before the classifier",
    ),
    Published(
        "distilbert-base-uncased", 66_362_880 + 768 * 769, DISTILBERT, "DistilBertModel, and the layer before the classifier"
    ),
    Published("google/vit-base-patch16-224", 86_567_656 - 1000 * 769, VIT, "torchvision's vit_b_16, less its 1000 classes"),
]
ACTIVE = {"mistralai/Mixtral-8x7B-v0.1": 12.9, "Qwen/Qwen1.5-MoE-A2.7B": 2.7, "Qwen/Qwen3-30B-A3B": 3.3}
"""Billions of parameters that one token passes: arXiv:2401.04088 section 2.1; the Qwen models' cards."""


def anatomy_of(folder: Path, published: Published) -> ModelAnatomy:
    return row_of(write_base(folder, published.config))


def test_every_layout_has_a_published_model() -> None:
    assert {published.config["model_type"] for published in MODELS} == set(known_layouts())


@pytest.mark.parametrize("published", MODELS, ids=lambda published: published.model)
def test_the_count_is_the_published_one(tmp_path: Path, published: Published) -> None:
    anatomy = anatomy_of(tmp_path, published)
    assert anatomy.num_parameters() + sum(tensor.num_elements for tensor in anatomy.new_tensors) == published.total


@pytest.mark.parametrize("published", [model for model in MODELS if model.model in ACTIVE], ids=lambda published: published.model)
def test_the_parameters_that_a_token_passes_are_the_published_ones(tmp_path: Path, published: Published) -> None:
    anatomy = anatomy_of(tmp_path, published)
    assert anatomy.experts is not None
    stacked = sum(anatomy.tensors[name].num_elements for block in anatomy.stacked for name in block)
    active = anatomy.num_parameters() - stacked + stacked * anatomy.experts.experts_per_token // anatomy.experts.num_experts
    assert active / 1e9 == pytest.approx(ACTIVE[published.model], abs=0.06)


def test_pythias_card_counts_without_embeddings_too(tmp_path: Path) -> None:
    (pythia,) = [published for published in MODELS if "pythia" in published.model]
    anatomy = anatomy_of(tmp_path, pythia)
    outside = (*anatomy.embeddings, anatomy.head_weight)
    assert anatomy.num_parameters() - sum(anatomy.tensors[name].num_elements for name in outside) == 6_444_163_072


def test_the_shipped_shapes_are_the_published_ones(repository: Path) -> None:
    counts = {
        size: read_anatomy(repository / "jobs" / "specs" / "shapes" / f"llama-3.1-{size}", need_weights=False).num_parameters()
        for size in ("8b", "70b")
    }
    assert counts == {"8b": 8_030_261_248, "70b": 70_553_706_496}
