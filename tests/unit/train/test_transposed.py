"""Matrices that lie [in, out] (GPT-2's Conv1D): adapters on them are those of PEFT, and they are recomputed and quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orchestrator.anatomy import select
from orchestrator.spec.adapters import ADAPTER_KINDS, AdapterOptions
from orchestrator.train.adapters.artifacts import attach_artifact, save_artifact
from orchestrator.train.adapters.branch import open_branch
from orchestrator.work.artifact import read_artifact

from .small_bases import small_anatomy, small_base, small_folder

IDS = torch.arange(1, 17)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("gpt2"), "gpt2", n_embd=64)


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_adapters_are_those_of_peft(folder: Path, tmp_path: Path, kind: str) -> None:
    anatomy = small_anatomy(folder)
    assert set(anatomy.transposed) == {name for block in anatomy.linears for name in block}
    base = small_base(folder, anatomy)
    options = AdapterOptions.model_validate({"kind": kind})
    selection = select(anatomy, "last:2", "lora", 4, adapter=options, task="text")
    with open_branch(base, selection, lora_alpha=8, seed=1) as branch:
        generator = torch.Generator().manual_seed(2)
        for _, parameter in branch.learning_parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        mine = base.model(input_ids=IDS).logits
        mine.square().mean().backward()
        learning = branch.learning_parameters()
        gradients = {name: parameter.grad.clone() for name, parameter in learning if parameter.grad is not None}
        values = {name: parameter.detach().clone() for name, parameter in branch.learning_parameters()}
        save_artifact(branch, tmp_path, values)
    read_artifact(tmp_path).check(anatomy, 0, selection)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter", is_trainable=True)
    theirs = plain(input_ids=IDS).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    theirs.square().mean().backward()
    compared = 0
    for name, parameter in plain.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".default", "")
        own = own if own in gradients else own.removesuffix(".weight")
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[own], parameter.grad, rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared == len(gradients)
    with attach_artifact(base, tmp_path), torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=IDS).logits, mine)


def test_a_quantized_base_trains_them_as_they_are_stored(folder: Path) -> None:
    anatomy = small_anatomy(folder)
    base = small_base(folder, anatomy, quantize="nf4")
    for tune in ("lora", "full"):
        selection = select(anatomy, "last:1", tune, 4 if tune == "lora" else None, task="text")
        with open_branch(base, selection, lora_alpha=8, seed=1) as branch:
            whole = {name: tuple(parameter.shape) for name, parameter in branch.learning_parameters()}
            base.model(input_ids=IDS).logits.square().mean().backward()
            assert all(parameter.grad is not None for _, parameter in branch.learning_parameters())
    stored = {name: anatomy.tensors[name].shape for name in whole}
    assert whole == stored
