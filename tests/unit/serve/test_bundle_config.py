"""The bundle's config.json: the class that was loaded, and no code that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.plan.merge import MergePlan, make_merge_plan
from orchestrator.serve.bundle import bundle_config, served_classes

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def plan(make_base: Callable, load_of: Callable, tools, tmp_path: Path) -> MergePlan:
    anatomy = make_base()
    artifact = tools.write_adapter(tmp_path / "rung", tools.random_pairs(anatomy, (QUERY,)))
    return make_merge_plan(anatomy, artifact, load_of(anatomy))


@pytest.mark.parametrize("named", [None, [], ["LlamaModel"], ["LlamaForSequenceClassification"], ["LLaMAForCausalLM"]])
def test_architectures_are_the_class_that_was_loaded(plan: MergePlan, tmp_path: Path, named: list[str] | None):
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"architectures": named}
    if named is None:
        del config["architectures"]
    assert bundle_config(config, plan)["architectures"] == ["LlamaForCausalLM"]


def test_the_code_of_a_native_type_is_not_named(plan: MergePlan, tmp_path: Path):
    """Training loaded transformers' class, so that a server must not load the base's."""
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}
    found = bundle_config(config, plan)
    assert "auto_map" not in found
    assert found == {key: value for key, value in config.items() if key != "auto_map"}, "and nothing else changes"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi3", "mistral", "olmo2"])
def test_the_class_is_the_one_that_transformers_loads(model_type: str):
    config = AutoConfig.for_model(model_type, num_hidden_layers=1)
    loaded = AutoModelForCausalLM._model_mapping[type(config)].__name__  # type: ignore[index]
    assert served_classes({"model_type": model_type}, "AutoModelForCausalLM") == [loaded]


def test_a_model_around_a_language_model_keeps_its_class():
    whole = {"model_type": "qwen3_5", "text_config": {}, "architectures": ["Qwen3_5ForConditionalGeneration"]}
    assert served_classes(whole, "AutoModelForCausalLM") == ["Qwen3_5ForConditionalGeneration"]


def test_a_type_that_transformers_does_not_know_keeps_its_names():
    assert served_classes({"model_type": "own", "architectures": ["Own"]}, "AutoModelForCausalLM") == ["Own"]
