"""The control `scratch`: random weights by the seed, everything learns, and the base comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from orchestrator.anatomy import select_everything, trainable_layouts
from orchestrator.anatomy.layouts import LAYOUTS
from orchestrator.errors import TrainingError
from orchestrator.spec.models import Task
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.scratch import begin_anew

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "gemma": {**SIZES, "head_dim": 8},
    "gemma3_text": {**SIZES, "head_dim": 8},
    "phi3": {**SIZES, "pad_token_id": 0},
}
TASKS: list[tuple[str, Task]] = [
    (name, "classify" if LAYOUTS[name].kind == "encoder" else "completion") for name in trainable_layouts()
]


@pytest.mark.parametrize("tied", [True, False])
def test_it_begins_at_random_and_leaves_the_base_as_it_was(
    tied: bool, llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]
) -> None:
    base = base_of(llama_folder(tied=tied))
    before = {name: parameter.detach().clone() for name, parameter in base.model.named_parameters()}
    selection = select_everything(base.anatomy, task="completion")
    assert set(selection.trainable) == set(base.anatomy.tensors)
    drawn: list[dict[str, torch.Tensor]] = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        with open_branch(base, selection, lora_alpha=0, seed=seed) as branch:
            begin_anew(branch, seed)
            drawn.append({name: parameter.detach().clone() for name, parameter in branch.learning_parameters()})
        assert torch.equal(torch.get_rng_state(), state), "nobody else's numbers are moved"
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    matrices = [name for name, value in drawn[0].items() if value.ndim == 2]
    assert matrices
    new = dict(type(base.model)(base.model.config).named_parameters())
    vectors = [name for name, value in drawn[0].items() if value.ndim == 1]
    assert vectors
    assert all(torch.equal(drawn[0][name], new[name].to(drawn[0][name].dtype)) for name in vectors), (
        "norms begin as they always do"
    )
    for name in matrices:
        assert not torch.equal(drawn[0][name], drawn[2][name])
        assert not torch.equal(drawn[0][name], before[name])
        assert float(drawn[0][name].std()) == pytest.approx(base.model.config.initializer_range, rel=0.2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize(("name", "task"), [*TASKS, ("llama", "classify")])
def test_every_layout_begins_as_a_new_model_of_it_does(
    name: str, task: Task, tmp_path: Path, base_of: Callable[..., LoadedBase]
) -> None:
    """Matrices have its spread, within five times what two samples of their size differ by; vectors have its values. What is
    drawn module by module misses what a layout would do to the model as a whole, such as smaller residual projections."""
    kind = AutoModelForMaskedLM if LAYOUTS[name].kind == "encoder" else AutoModelForCausalLM
    stored: Any = kind.from_config(AutoConfig.for_model(name, **OWN_SIZES.get(name, SIZES)))
    for parameter in stored.parameters():
        nn.init.constant_(parameter, 5.0)
    stored.save_pretrained(tmp_path)
    base = base_of(tmp_path, task=task)
    selection = select_everything(base.anatomy, task=task, num_classes=base.load.num_classes)
    torch.manual_seed(1)
    new = {key: parameter.detach() for key, parameter in type(base.model)(base.model.config).named_parameters()}
    with open_branch(base, selection, lora_alpha=0, seed=0) as branch:
        begin_anew(branch, 0)
        drawn = {key: parameter.detach().clone() for key, parameter in branch.learning_parameters()}
    assert len(drawn) == len(selection.trainable)
    for key, value in drawn.items():
        if value.ndim < 2:
            assert torch.equal(value, new[key]), key
        else:
            assert float(value.std()) == pytest.approx(float(new[key].std()), rel=5 / value.numel() ** 0.5), key


def test_what_a_new_model_leaves_without_values_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]
) -> None:
    base = base_of(llama_folder())
    usual = type(base.model)._init_weights

    def all_but_matrices(model: Any, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear):
            usual(model, module)

    monkeypatch.setattr(type(base.model), "_init_weights", all_but_matrices)
    selection = select_everything(base.anatomy, task="completion")
    with (
        open_branch(base, selection, lora_alpha=0, seed=0) as branch,
        pytest.raises(TrainingError, match=r"cannot reinitialise model\.layers\.0\.self_attn\.q_proj\.weight"),
    ):
        begin_anew(branch, 0)
