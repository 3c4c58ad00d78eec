"""The control `scratch`: random weights by the seed, everything learns, and the base comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.anatomy import select_everything
from orchestrator.train.base import LoadedBase
from orchestrator.train.branch import open_branch
from orchestrator.train.scratch import begin_anew


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
