"""Layouts that can be planned with and not trained, and configs that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ViTForImageClassification

from orchestrator.anatomy import known_layouts, read_anatomy, trainable_layouts
from orchestrator.errors import BaseError

from .bases import config_of, write_base


def error_of(folder: Path, *, need_weights: bool) -> BaseError:
    with pytest.raises(BaseError) as caught:
        read_anatomy(folder, need_weights=need_weights)
    assert caught.value.remedy
    assert str(folder) in caught.value.where
    return caught.value


def save(folder: Path, model_type: str, **changes: Any) -> Path:
    """A model as transformers writes it."""
    config: Any = AutoConfig.for_model(**config_of(model_type, **changes))
    model: Any = ViTForImageClassification(config) if model_type == "vit" else AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_the_reference_lists_the_layouts_of_the_table(repository: Path) -> None:
    bases = (repository / "docs" / "spec.md").read_text().split("\n## Bases\n")[1]
    trained, _, others = bases.partition("| from a table |")
    assert {name for name in known_layouts() if f"`{name}`" in trained} == set(trainable_layouts())
    assert "`vit` | from the table, for planning only" in others


def test_a_layout_for_planning_only_says_why_it_cannot_be_trained(tmp_path: Path) -> None:
    folder = save(tmp_path, "vit")
    error = error_of(folder, need_weights=True)
    assert "can be planned for, not trained" in error.what
    assert read_anatomy(folder, need_weights=False).plan_only in error.what
    assert "llama" in error.expected
    assert "vit" not in error.expected.replace(",", "").split()


def test_its_weights_may_have_other_names_and_must_be_as_many(tmp_path: Path) -> None:
    folder = save(tmp_path, "vit")
    anatomy = read_anatomy(folder, need_weights=False)
    assert not anatomy.has_weights
    assert {tensor.file for tensor in anatomy.tensors.values()} == {""}
    assert {tensor.dtype for tensor in anatomy.tensors.values()} == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    error = error_of(folder, need_weights=False)
    assert f"{anatomy.num_parameters():,} weights are stored" in error.what
    assert "by config.json" in error.expected


@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": 2}, "mlp_only_layers is 2"),
        ("qwen3_moe", {"num_experts": "6"}, "num_experts is '6'"),
        ("llama", {"hidden_act": None}, "hidden_act is None"),
        ("vit", {"image_size": [224, 224]}, "image_size is [224, 224]"),
        ("bert", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ],
)
def test_configs_that_make_no_sense(tmp_path: Path, model_type: str, changes: dict[str, Any], what: str) -> None:
    assert what in error_of(write_base(tmp_path, config_of(model_type, **changes)), need_weights=False).what
