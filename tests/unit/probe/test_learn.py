"""What is learned of bases that no table describes: wrappers, odd checkpoints, types without a class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from orchestrator.anatomy import ModelAnatomy, select
from orchestrator.anatomy.learning import Question, Refusal
from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.weights import read_weights
from orchestrator.plan.cost.flops import head_elements
from orchestrator.plan.memory.footprint import learning_counts
from orchestrator.probe.classes import RefusedError
from orchestrator.probe.learn import answer, learn
from orchestrator.spec.tasks import HeadKind
from orchestrator.work.artifact import new_shapes

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def save(folder: Path, model_type: str, kind: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(model_type, **{**SMALL, **changes}))
    model.save_pretrained(folder)
    return model


def learned(folder: Path, head: HeadKind = "language_model", *, weights: bool = True) -> ModelAnatomy:
    stored = read_weights(folder) if weights else None
    return learn(Question(folder=str(folder), head=head, stored=None if stored is None else tuple(stored.values())))


def refusal(folder: Path, head: HeadKind = "language_model") -> Refusal:
    stored = read_weights(folder)
    found = answer(Question(folder=str(folder), head=head, stored=None if stored is None else tuple(stored.values()))).refusal
    assert found is not None
    return found


def change(folder: Path, tensors: Any = None, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    if tensors is not None:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("model_type", ["olmo2", "smollm3", "granite", "cohere2", "starcoder2", "stablelm", "glm4"])
def test_a_dense_decoder_has_the_names_and_shapes_of_its_class(tmp_path: Path, model_type: str) -> None:
    model = save(tmp_path, model_type, head_dim=8)
    anatomy = learned(tmp_path)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in anatomy.tensors.items()} == parameters
    assert anatomy.architecture == type(model).__name__
    assert (anatomy.num_blocks, anatomy.hidden_size, anatomy.num_heads, anatomy.num_kv_heads) == (3, 32, 4, 2)
    for number, block in enumerate(anatomy.blocks):
        assert set(block) == {name for name in parameters if name.startswith(f"model.layers.{number}.")}
        matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert set(anatomy.linears[number]) == set(block) & matrices
    outside = {*anatomy.embeddings, *anatomy.final_norm, *([] if anatomy.tied else [anatomy.head_weight])}
    assert outside | {name for block in anatomy.blocks for name in block} == set(parameters)
    assert all(not tensor.stored_name for tensor in anatomy.tensors.values())
    assert anatomy.ways.projects


def test_what_follows_the_head_is_seen(tmp_path: Path) -> None:
    save(tmp_path / "a", "granite", logits_scaling=4.0)
    assert learned(tmp_path / "a").logit_scale == 0.25
    save(tmp_path / "b", "cohere2", logit_scale=0.125, head_dim=8)
    assert learned(tmp_path / "b").logit_scale == 0.125


def test_blocks_of_other_kinds_are_told_apart(tmp_path: Path) -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    save(tmp_path, "cohere2", layer_types=types, sliding_window=8, head_dim=8)
    assert learned(tmp_path).block_kinds == (0, 0, 1)


def test_the_text_model_in_a_wrapper_is_found_in_place(tmp_path: Path) -> None:
    text = {**SMALL, "head_dim": 8, "model_type": "gemma3_text", "sliding_window": 16}
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    anatomy = learned(tmp_path)
    assert anatomy.architecture == "Gemma3ForConditionalGeneration"
    assert (anatomy.backbone, anatomy.blocks_module) == ("model.language_model", "model.language_model.layers")
    assert (anatomy.head_weight, anatomy.tied) == ("lm_head.weight", True)
    assert anatomy.embeddings == ("model.language_model.embed_tokens.weight",)
    names = {name for name, _ in model.named_parameters()}
    assert set(anatomy.others) == {name for name in names if "language_model" not in name}
    assert set(anatomy.tensors) == names
    assert (anatomy.num_blocks, anatomy.hidden_size, anatomy.vocab_size) == (3, 32, 48)
    assert anatomy.ways.projects


def test_tensors_that_the_class_does_not_have_are_extra(tmp_path: Path) -> None:
    save(tmp_path, "qwen3", head_dim=8)
    last = "model.layers.2."
    change(
        tmp_path,
        lambda tensors: {
            **tensors,
            **{f"model.layers.3.{name.removeprefix(last)}": t.clone() for name, t in tensors.items() if name.startswith(last)},
            "model.layers.3.eh_proj.weight": torch.zeros(32, 64),
            "v_head.weight": torch.zeros(1, 32),
        },
    )
    names = {tensor.name for tensor in learned(tmp_path).extra}
    assert {"v_head.weight", "model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_proj.weight"} <= names
    assert all(name.startswith(("v_head.", "model.layers.3.")) for name in names)


def test_a_block_more_than_the_config_says_is_a_mistake(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    change(tmp_path, num_hidden_layers=2, layer_types=None)
    found = refusal(tmp_path)
    assert (found.kind, found.what) == ("weights", "3 blocks are stored, and config.json says 2")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    change(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if "layers.1.mlp.up_proj" not in name})
    found = refusal(tmp_path)
    assert (found.kind, found.what) == ("weights", "1 tensors missing: model.layers.1.mlp.up_proj.weight")


def test_a_classifier_needs_no_output_projection(tmp_path: Path) -> None:
    save(tmp_path, "llama", AutoModelForSequenceClassification, num_labels=5)
    anatomy = learned(tmp_path, "classification")
    assert (anatomy.classifier_weight, anatomy.classifier_bias, anatomy.head_weight) == ("score.weight", "", "lm_head.weight")
    assert anatomy.new_tensors == () == anatomy.extra
    assert "lm_head.weight" not in anatomy.tensors
    assert "score.weight" not in anatomy.tensors
    assert refusal(tmp_path).what == "lm_head.weight is missing: the checkpoint holds a classifier"


def test_an_encoder_is_its_classifier_and_its_old_names_are_read(tmp_path: Path) -> None:
    from transformers import BertConfig

    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(BertConfig(**WIDE)).save_pretrained(tmp_path)

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    change(tmp_path, lambda tensors: {old(name): tensor for name, tensor in tensors.items()})
    anatomy = learned(tmp_path, "classification")
    assert anatomy.tensors["bert.embeddings.LayerNorm.weight"].stored_name == "bert.embeddings.LayerNorm.gamma"
    assert [tensor.name for tensor in anatomy.new_tensors] == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert anatomy.extra == (), "its head for masked tokens is nothing unusual"


def test_embeddings_may_be_narrower_than_the_blocks(tmp_path: Path) -> None:
    model = save(tmp_path / "opt", "opt", word_embed_proj_dim=8, ffn_dim=64)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    opt = learned(tmp_path / "opt").model_copy(update={"new_rows": (5, 6)})
    assert (opt.hidden_size, opt.tied) == (32, True)
    assert opt.matrix_shape(opt.head_weight) == shapes[opt.head_weight] == (48, 8)
    rows = new_shapes(opt, 0)
    assert rows[opt.head_weight] == (48, 8)
    assert rows[f"{opt.embeddings[0].removesuffix('weight')}{NEW_ROWS}"] == (2, 8)
    for policy, extra in (("all+head", 48 * 8), ("all+new_tokens", 2 * 8)):
        both = [select(opt, each, "full", None, task="text") for each in (policy, "all")]
        assert both[0].num_trainable_parameters - both[1].num_trainable_parameters == extra
        counts = [learning_counts(opt, each) for each in both]
        assert sum(counts[0]) - sum(counts[1]) == extra
    assert head_elements(opt) == 48 * 8


def test_a_classifier_reads_what_its_class_says(tmp_path: Path) -> None:
    save(tmp_path, "electra", AutoModelForSequenceClassification, embedding_size=8)
    electra = learned(tmp_path, "classification")
    assert (electra.hidden_size, electra.embedding_width, electra.classifier_inputs) == (32, 8, 32)
    wider = electra.model_copy(update={"classifier_width": 40})
    both = [select(each, "all", "full", None, task="classify", num_classes=5) for each in (wider, electra)]
    assert both[0].num_trainable_parameters - both[1].num_trainable_parameters == 5 * 8
    assert new_shapes(wider, 5)[wider.classifier_weight] == (5, 40)
    assert head_elements(wider, 5) == 5 * 40


def test_types_without_a_class(tmp_path: Path) -> None:

    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    found = refusal(tmp_path)
    assert (found.kind, found.what) == ("no_class", "there is no class for model_type 'vit' that generates text")
    (tmp_path / "config.json").write_text('{"model_type": ["llama"]}')
    assert refusal(tmp_path).kind == "unknown_type"
    (tmp_path / "config.json").write_text('{"model_type": "stranger"}')
    found = refusal(tmp_path)
    assert found.kind == "unknown_type"
    assert "llama" in found.known_types
    (tmp_path / "config.json").write_text('{"model_type": "olmo2", "hidden_size": "wide"}')
    assert refusal(tmp_path).kind == "config"
    (tmp_path / "config.json").write_text('{"model_type": "hrm_text"}')
    with pytest.raises(RefusedError, match="several lists"):
        learned(tmp_path, weights=False)
