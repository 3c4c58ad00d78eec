"""Every adapter kind against PEFT: the same outputs, the same gradients, the same merged weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from orchestrator.anatomy import LayerSelection, select
from orchestrator.errors import SelectionError
from orchestrator.plan.memory.footprint import learning_counts
from orchestrator.plan.merge import make_merge_plan
from orchestrator.serve.merging import merge
from orchestrator.spec.adapters import ADAPTER_KINDS, AdapterOptions
from orchestrator.train.adapters.artifacts import attach_artifact, save_artifact
from orchestrator.train.adapters.branch import Branch, open_branch
from orchestrator.train.integrity import changed, fingerprint, tensors_of
from orchestrator.train.model.base import LoadedBase

IDS = torch.arange(1, 17)[None]
KINDS = tuple(ADAPTER_KINDS)
ALPHA = 12


def selected(base: LoadedBase, kind: str, policy: str = "all") -> LayerSelection:
    load = base.load
    options = AdapterOptions.model_validate({"kind": kind})
    return select(base.anatomy, policy, "lora", 4, adapter=options, task=load.task, num_classes=load.num_classes)


def opened(base: LoadedBase, kind: str, policy: str = "all") -> Branch:
    return open_branch(base, selected(base, kind, policy), lora_alpha=ALPHA, seed=1)


def moved(branch: Branch) -> dict[str, torch.Tensor]:
    """Give everything that learns new values, as training would."""
    generator = torch.Generator().manual_seed(11)
    for _, parameter in branch.learning_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return {name: parameter.detach().clone() for name, parameter in branch.learning_parameters()}


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    found = model(input_ids=IDS)
    return (found.logits.float() ** 2).mean() + found.logits.float().sin().sum()


def peft_model(base: LoadedBase, adapter: Path) -> PeftModel:
    options: dict[str, object] = {"dtype": base.dtype}
    if base.load.quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=base.dtype,
            bnb_4bit_quant_storage=base.dtype,
        )
    loader = AutoModelForSequenceClassification if base.load.task == "classify" else AutoModelForCausalLM
    classes = {"num_labels": base.load.num_classes} if base.load.task == "classify" else {}
    plain: PreTrainedModel = loader.from_pretrained(base.load.folder, **options, **classes)
    return PeftModel.from_pretrained(plain, adapter, is_trainable=True).train()


@pytest.mark.parametrize(
    ("folder", "quantize", "task", "policy"),
    [
        ("llama", "none", "completion", "all"),
        ("llama", "none", "completion", "last:1+head"),
        ("wide", "nf4", "completion", "all"),
        ("qwen", "none", "completion", "all"),
        ("llama", "none", "classify", "last:2"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it_and_computes_the_same(
    kind: str,
    folder: str,
    quantize: str,
    task: str,
    policy: str,
    llama_folder: Callable[..., Path],
    qwen_folder: Path,
    base_of: Callable[..., LoadedBase],
    tmp_path: Path,
) -> None:
    where = {"llama": llama_folder, "wide": lambda: llama_folder(hidden_size=256), "qwen": lambda: qwen_folder}[folder]()
    base = base_of(where, quantize=quantize, task=task)
    base.model.train()
    with opened(base, kind, policy) as branch:
        saved = save_artifact(branch, tmp_path, moved(branch))
        ours = loss_of(branch.model)
        ours.backward()
        gradients = {name: parameter.grad for name, parameter in branch.learning_parameters()}
    theirs = peft_model(base, saved)
    loss = loss_of(theirs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-4)
    loss.backward()
    found = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    adapters = {name: gradient for name, gradient in gradients.items() if ".lora_" in name}
    assert adapters.keys() == {name for name in found if ".lora_" in name}
    for name, gradient in adapters.items():
        torch.testing.assert_close(gradient, found[name], rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_dropout_it_computes_what_peft_computes_under_the_same_masks(
    kind: str, quantize: str, llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], tmp_path: Path
) -> None:
    base = base_of(llama_folder(hidden_size=256), quantize=quantize)
    plain = selected(base, kind)
    options = plain.adapter.model_copy(update={"dropout": 0.3})
    with open_branch(base, plain.model_copy(update={"adapter": options}), lora_alpha=ALPHA, seed=1) as branch:
        saved = save_artifact(branch, tmp_path, moved(branch))
        branch.model.train()
        torch.manual_seed(5)
        ours = loss_of(branch.model)
        torch.manual_seed(6)
        assert loss_of(branch.model) != ours
        branch.model.eval()
        assert torch.equal(loss_of(branch.model), loss_of(branch.model))
        branch.model.train()
    theirs = peft_model(base, saved)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, loss_of(theirs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_model_is_the_base_and_after_the_last_the_base_is_whole(
    kind: str, quantize: str, dtype: torch.dtype, llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase]
) -> None:
    base = base_of(llama_folder(hidden_size=256), quantize=quantize, dtype=dtype)
    before, frozen = base.model(input_ids=IDS).logits, fingerprint(tensors_of(base.model))
    with opened(base, kind) as branch:
        assert torch.equal(branch.model(input_ids=IDS).logits, before)
        planned = learning_counts(base.anatomy, branch.selection)
        assert planned == tuple(parameter.numel() for _, parameter in branch.learning_parameters())
        assert sum(planned) == branch.selection.num_trainable_parameters
        moved(branch)
        assert not torch.equal(branch.model(input_ids=IDS).logits, before)
    assert not changed(frozen, fingerprint(tensors_of(base.model)))
    assert torch.equal(base.model(input_ids=IDS).logits, before)
    assert not any(module._forward_hooks for module in base.model.modules())


@pytest.mark.parametrize(("quantize", "policy"), [("none", "all"), ("none", "last:1+head"), ("nf4", "all")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weights_are_those_of_peft(
    kind: str, quantize: str, policy: str, llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], tmp_path: Path
) -> None:
    base = base_of(llama_folder(hidden_size=256), quantize=quantize)
    with opened(base, kind, policy) as branch:
        saved = save_artifact(branch, tmp_path, moved(branch))
        trained = branch.model(input_ids=IDS).logits
    (tmp_path / "merged").mkdir()
    plan = make_merge_plan(base.anatomy, tmp_path, base.load, selected(base, kind, policy), held_dtype="float32")
    merge(plan, tmp_path / "merged")
    weights = {
        name: tensor.float() for file in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    plain = AutoModelForCausalLM.from_pretrained(base.load.folder, dtype=torch.float32, tie_word_embeddings="+head" not in policy)
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(plain(input_ids=IDS).logits, trained, rtol=0.1, atol=0.1)  # merged weights are bf16
    if quantize == "none":
        theirs = peft_model(base, saved).merge_and_unload().state_dict()
        for name in selected(base, kind, policy).adapted:
            torch.testing.assert_close(
                weights[name], theirs[name], rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_attached_again(
    kind: str, llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], tmp_path: Path
) -> None:
    base = base_of(llama_folder())
    with opened(base, kind) as branch:
        save_artifact(branch, tmp_path, moved(branch))
        trained, selection = branch.model(input_ids=IDS).logits, branch.selection
    with attach_artifact(base, tmp_path) as again:
        assert torch.equal(again.model(input_ids=IDS).logits, trained)
        assert (again.selection.adapter, again.lora_alpha) == (selection.adapter, ALPHA)
        assert again.selection.num_trainable_parameters == selection.num_trainable_parameters


def test_an_adapter_without_its_magnitudes_is_refused(
    llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], tmp_path: Path
) -> None:
    base = base_of(llama_folder())
    with opened(base, "lora") as branch:
        saved = save_artifact(branch, tmp_path, moved(branch))
    config = saved / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(SelectionError, match="has no lora_magnitude_vector"):
        make_merge_plan(base.anatomy, tmp_path, base.load)
