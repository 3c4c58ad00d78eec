"""Parameters by their stored names: what `map_names` says equals what `from_pretrained` loads, element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    conversion_mapping,
)
from transformers.core_model_loading import PermuteForRope, WeightConverter

from orchestrator.anatomy.weights import read_weights
from orchestrator.errors import BaseError
from orchestrator.probe.names import NameMap, map_names
from orchestrator.train.model.stored import part_of, read_parameters

CAUSAL, MASKED, CLASSES = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
EXPERTS: dict[str, Any] = {
    **SMALL,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    **EXPERTS,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (CAUSAL, SMALL),
    "phi3": (CAUSAL, SMALL),
    "gpt_neox": (CAUSAL, SMALL),
    "gpt2": (CAUSAL, {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": (CAUSAL, EXPERTS),
    "qwen2_moe": (CAUSAL, EXPERTS),
    "qwen3_moe": (CAUSAL, EXPERTS),
    "olmoe": (CAUSAL, EXPERTS),
    "deepseek_v3": (CAUSAL, LATENT),
    "glm4_moe": (CAUSAL, EXPERTS),
    "gpt_oss": (CAUSAL, EXPERTS),
    "granitemoe": (CAUSAL, EXPERTS),
    "dbrx": (
        CAUSAL,
        {
            "vocab_size": 40,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jamba": (CAUSAL, {**EXPERTS, "use_mamba_kernels": False}),
    "bert": (MASKED, SMALL),
    "gte": (MASKED, SMALL),
    "nomic_bert": (MASKED, SMALL),
    "olmo_hybrid": (
        CAUSAL,
        {
            **SMALL,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gemma3": (
        AutoModelForImageTextToText,
        {"text_config": {**SMALL, "model_type": "gemma3_text"}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "llava": (
        AutoModelForImageTextToText,
        {"text_config": {**SMALL, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"}},
    ),
    "qwen3_vl_moe": (
        AutoModelForImageTextToText,
        {
            "text_config": EXPERTS,
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    "t5": (AutoModelForSeq2SeqLM, {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}),
}


def config_of(kind: str) -> Any:
    auto, values = MODELS[kind]
    return auto, AutoConfig.for_model(kind, **values, dtype="float32")


def saved(kind: str, folder: Path, *, shard: str = "20KB") -> tuple[Any, Any]:
    """Write a small model in the names of the hub, and return its class and config."""
    auto, config = config_of(kind)
    torch.manual_seed(0)
    model = auto.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    return auto, config


def mapped(auto: Any, folder: Path) -> NameMap:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = auto.from_config(config)
    stored = read_weights(folder)
    assert stored is not None
    return map_names(model, stored)


def assert_as_loaded(auto: Any, folder: Path, names: NameMap) -> None:
    loaded, info = auto.from_pretrained(folder, output_loading_info=True, dtype="float32")
    state = loaded.state_dict()
    assert set(names.missing) == set(info["missing_keys"])
    read = read_parameters(folder, names.tensors.values())
    for name, value in read.items():
        assert torch.equal(value, state[name]), name
    for name, first in names.tied.items():
        assert torch.equal(read[first], state[name]), name
    assert set(state) == {*read, *names.tied, *names.missing, *names.mismatched}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_as_loaded(kind: str, tmp_path: Path) -> None:
    auto, _ = saved(kind, tmp_path)
    names = mapped(auto, tmp_path)
    assert_as_loaded(auto, tmp_path, names)
    assert names.missing == ()
    assert names.extra == ()
    assert names.mismatched == {}


def rewrite(folder: Path, change: Any) -> None:
    """Replace the base's files by one, with its tensors as `change` returns them."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, folder / "model.safetensors")


@pytest.mark.parametrize("auto", [MASKED, CLASSES, AutoModel], ids=["masked", "classes", "backbone"])
def test_gamma_and_beta(auto: Any, tmp_path: Path) -> None:
    saved("bert", tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(name: str) -> str:
        for new, gamma in old.items():
            name = name.replace(new, gamma)
        return name

    rewrite(tmp_path, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    names = mapped(auto, tmp_path)
    assert_as_loaded(auto, tmp_path, names)
    norm = "embeddings.LayerNorm.weight" if auto is AutoModel else "bert.embeddings.LayerNorm.weight"
    assert names.tensors[norm].stored_name == "bert.embeddings.LayerNorm.gamma"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_backbone_lacks_the_prefix_and_the_head(kind: str, tmp_path: Path) -> None:
    _, config = config_of(kind)
    config.pad_token_id = 0
    AutoModel.from_config(config).save_pretrained(tmp_path)
    names = mapped(CLASSES, tmp_path)
    assert_as_loaded(CLASSES, tmp_path, names)
    assert names.missing
    assert not names.extra
    with pytest.raises(BaseError, match="missing: "):
        names.check(kind, str(tmp_path), needed=[*names.tensors, *names.missing])


def test_extra_tensors_are_listed(tmp_path: Path) -> None:
    auto, _ = saved("deepseek_v3", tmp_path)
    added = {"model.layers.2.eh_proj.weight": torch.ones(16, 32), "v_head.summary.weight": torch.ones(1, 16)}
    experts = {f"model.layers.2.mlp.experts.{n}.{p}_proj.weight": torch.ones(8, 16) for n in range(4) for p in ("gate", "up")}
    rewrite(tmp_path, lambda tensors: tensors | added | experts)
    names = mapped(auto, tmp_path)
    assert_as_loaded(auto, tmp_path, names)
    # A deepseek_v3 leaves the tensors of block 61 out without a word, not those of block 2.
    assert {info.name for info in names.extra} == {*added, *experts}
    assert names.ignored == ()


def test_a_classifier_as_base(tmp_path: Path) -> None:
    _, config = config_of("llama")
    config.num_labels = 3
    CLASSES.from_config(config).save_pretrained(tmp_path)
    names = mapped(CAUSAL, tmp_path)
    assert [info.name for info in names.extra] == ["score.weight"]
    assert names.missing == ("lm_head.weight",)
    with torch.device("meta"):
        config.num_labels = 5
        model = CLASSES.from_config(config)
    stored = read_weights(tmp_path)
    assert stored is not None
    assert map_names(model, stored).mismatched == {"score.weight": (3, 16)}


def test_a_head_that_is_stored_though_tied(tmp_path: Path) -> None:
    auto, config = config_of("llama")
    config.tie_word_embeddings = True
    auto.from_config(config).save_pretrained(tmp_path)
    assert mapped(auto, tmp_path).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    names = mapped(auto, tmp_path)
    assert names.stored_twice == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not names.tied
    assert_as_loaded(auto, tmp_path, names)


def test_an_embedding_that_is_stored_as_the_head(tmp_path: Path) -> None:
    auto, config = config_of("llama")
    config.tie_word_embeddings = True
    auto.from_config(config).save_pretrained(tmp_path)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: {head if name == embedding else name: tensor for name, tensor in tensors.items()})
    names = mapped(auto, tmp_path)
    assert names.tensors[embedding].stored_name == head
    assert names.tied == {head: embedding}
    assert_as_loaded(auto, tmp_path, names)


def test_transposed_experts(tmp_path: Path) -> None:
    auto, _ = saved("qwen3_vl_moe", tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t.transpose(1, 2) if ".mlp.experts." in n else t for n, t in tensors.items()})
    names = mapped(auto, tmp_path)
    (part,) = names.tensors["model.language_model.layers.0.mlp.experts.down_proj"].parts
    assert part.transposed
    assert part.shape == (4, 8, 16)
    assert_as_loaded(auto, tmp_path, names)


def test_one_expert_is_read_alone(tmp_path: Path) -> None:
    auto, _ = saved("mixtral", tmp_path)
    info = mapped(auto, tmp_path).tensors["model.layers.1.mlp.experts.gate_up_proj"]
    expert = part_of(info, (2,))
    assert {part.name.split(".")[5] for part in expert.parts} == {"2"}
    whole = read_parameters(tmp_path, [info])[info.name]
    assert torch.equal(read_parameters(tmp_path, [expert])[info.name], whole[2])


def test_an_operation_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto, _ = saved("llama", tmp_path)
    wq = "self_attn.q_proj.weight"
    conversion = WeightConverter([r"self_attn\.wq"], [wq], operations=[PermuteForRope()])
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [conversion])
    rewrite(tmp_path, lambda tensors: {name.replace("q_proj.weight", "wq"): tensor for name, tensor in tensors.items()})
    names = mapped(auto, tmp_path)
    with pytest.raises(BaseError, match="PermuteForRope"):
        names.check("llama", str(tmp_path), needed=[*names.tensors])
    with pytest.raises(BaseError, match="PermuteForRope"):
        read_parameters(tmp_path, [names.tensors[f"model.layers.0.{wq}"]])
    names.check("llama", str(tmp_path), needed=[name for name in names.tensors if wq not in name])
