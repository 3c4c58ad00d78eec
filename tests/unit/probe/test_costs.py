"""Costs counted on a class against the formulas of the layouts that have both, and where they cannot be counted."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from orchestrator.anatomy import ModelAnatomy, select
from orchestrator.anatomy.costs import BlockCosts
from orchestrator.plan.cost.flops import forward_terms, train_terms
from orchestrator.plan.memory.activations import BlockActivations, activations
from orchestrator.plan.memory.counted import counted_activations
from orchestrator.probe.classes import build
from orchestrator.probe.costs import CountError, count_costs
from orchestrator.spec.adapters import AdapterOptions
from tests.unit.anatomy.bases import row_of, write_base

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
TYPES = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
SELECTIONS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora all": ("all", "lora", {}),
    "lora last:1": ("last:1", "lora", {}),
    "lora on attention": ("all", "lora", {"modules": "attention"}),
    "lora with dropout": ("all", "lora", {"dropout": 0.1}),
    "full all": ("all", "full", {}),
    "full blocks:1": ("blocks:1", "full", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@cache
def both(folder: Path, model_type: str) -> tuple[ModelAnatomy, ModelAnatomy]:
    """The anatomy of the table, which has formulas, and the same with the costs of its class."""
    sizes = SIZES | (EXPERTS if model_type == "mixtral" else {}) | {"model_type": model_type}
    anatomy = row_of(write_base(folder / model_type, sizes))
    model = build(AutoConfig.from_pretrained(folder / model_type), TYPES[model_type])
    return anatomy, anatomy.model_copy(update={"block_costs": count_costs(model, anatomy)})


def chosen(anatomy: ModelAnatomy, name: str) -> Any:
    policy, tune, options = SELECTIONS[name]
    adapter = AdapterOptions.model_validate(options)
    return select(anatomy, policy, tune, 8 if tune == "lora" else None, adapter=adapter, task="completion")


def peak(block: BlockActivations) -> int:
    """Bytes per token of what a block keeps and needs in a row of 1024 tokens, besides gradients of weights."""
    kept = block.kept_bytes + block.kept_pair_bytes * 1024
    return kept + max(each.token_bytes + each.pair_bytes * 1024 for each in block.peaks if not each.at_weight)


def flops(anatomy: ModelAnatomy, selection: Any, checkpointing: bool) -> float:
    return sum(term.flops for term in train_terms(anatomy, selection, 700.0, checkpointing=checkpointing))


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_llama_costs_what_the_formulas_say(folder: Path, name: str) -> None:
    """What its last block keeps, to the byte, and the operations of a step."""
    row, counted = both(folder, "llama")
    selection = chosen(row, name)
    formula, found = activations(row, selection, 2)[-1], counted_activations(counted, selection, 2)[-1]
    # At the cut the formulas count what the first norm would keep for a gradient of its input: 4h + 4.
    only_with_input = 4 * row.hidden_size + 4 if selection.cut == row.num_blocks - 1 else 0
    assert found.kept_bytes == formula.kept_bytes - only_with_input
    assert found.kept_pair_bytes == formula.kept_pair_bytes == 2
    assert peak(found) == pytest.approx(peak(formula), rel=0.1)
    for checkpointing in (False, True):
        assert flops(counted, selection, checkpointing) == pytest.approx(flops(row, selection, checkpointing), rel=0.001)


@pytest.mark.parametrize("name", ["lora all", "full all"])
@pytest.mark.parametrize("model_type", TYPES)
def test_other_layouts_cost_about_what_the_formulas_say(folder: Path, model_type: str, name: str) -> None:
    """Fused projections, a parallel MLP, experts; of some of these the formulas are upper bounds."""
    row, counted = both(folder, model_type)
    selection = chosen(row, name)
    formula, found = activations(row, selection, 2)[-1], counted_activations(counted, selection, 2)[-1]
    assert found.kept_bytes == pytest.approx(formula.kept_bytes, rel=0.05)
    assert found.kept_pair_bytes == formula.kept_pair_bytes
    assert peak(found) == pytest.approx(peak(formula), rel=0.16)
    for checkpointing in (False, True):
        assert flops(counted, selection, checkpointing) == pytest.approx(flops(row, selection, checkpointing), rel=0.03)
    forward = [sum(term.flops for term in forward_terms(each, 700.0)) for each in (row, counted)]
    assert forward[1] == pytest.approx(forward[0], rel=0.001)


def test_documents_one_by_one_are_counted_apart(folder: Path) -> None:
    row, counted = both(folder, "llama")
    selection = chosen(row, "lora all")
    formula, found = activations(row, selection, 2)[-1], counted_activations(counted, selection, 2)[-1]
    assert found.by_document_bytes < 0
    assert found.by_document_bytes == pytest.approx(formula.by_document_bytes, rel=0.02)


def test_costs_of_an_anatomy_outlast_a_process(folder: Path) -> None:
    costs = both(folder, "llama")[1].block_costs
    assert [BlockCosts.model_validate_json(each.model_dump_json(exclude_defaults=True)) for each in costs] == list(costs)


def test_a_class_that_looks_at_values_cannot_be_counted(folder: Path) -> None:
    row, _ = both(folder, "llama")
    model = build(AutoConfig.from_pretrained(folder / "llama"), TYPES["llama"])
    model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *call: call[-1][call[-1].nonzero()[:, 0]])
    with pytest.raises(CountError, match="DynamicOutputShape"):
        count_costs(model, row)


def test_the_class_is_left_as_it_computes(folder: Path) -> None:
    """Nothing on the parameters' gradients nor the hooks stays behind from one pass to the next: two counts are equal."""
    row, counted = both(folder, "llama")
    again = count_costs(build(AutoConfig.from_pretrained(folder / "llama"), TYPES["llama"]), row)
    assert again == counted.block_costs
    assert not torch._C._len_torch_dispatch_stack()
