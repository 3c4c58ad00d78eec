from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.anatomy import LayerSelection
from orchestrator.errors import IntegrityError, TrainingError
from orchestrator.store import commit_folder
from orchestrator.train.adapters.artifacts import attach_artifact, load_artifact, save_artifact, selection_of
from orchestrator.train.adapters.branch import Branch, open_branch
from orchestrator.train.integrity import changed, fingerprint, tensors_of
from orchestrator.train.model.base import LoadedBase

IDS = torch.arange(1, 17)[None]
Selector = Callable[..., LayerSelection]

PLAIN_LOAD = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

for case in json.loads(sys.argv[1]):
    options = {"dtype": torch.float32, "local_files_only": True}
    if case["quantize"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32)
    if case["task"] == "classify":
        base = AutoModelForSequenceClassification.from_pretrained(case["base"], num_labels=3, pad_token_id=0, **options)
    else:
        base = AutoModelForCausalLM.from_pretrained(case["base"], **options)
    if case["kind"] == "adapter":
        model = PeftModel.from_pretrained(base, case["artifact"] + "/adapter")
    else:
        delta = load_file(case["artifact"] + "/delta/delta.safetensors")
        if "lm_head.weight" in delta:
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
        report = base.load_state_dict(delta, strict=False)
        assert not report.unexpected_keys, report.unexpected_keys
        model = base
    model.train() if case["quantize"] == "nf4" else model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 17)[None]).logits
    save_file({"logits": logits.contiguous()}, case["logits"])
assert not any(name.split(".")[0] == "orchestrator" for name in sys.modules)
"""


def learned(branch: Branch) -> dict[str, torch.Tensor]:
    """Give every learning parameter new values, as training would, and return them whole."""
    generator = torch.Generator().manual_seed(11)
    for _, parameter in branch.learning_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return {name: parameter.detach().clone() for name, parameter in branch.learning_parameters()}


def logits_of(branch: Branch, *, evaluating: bool = True) -> torch.Tensor:
    branch.model.train(not evaluating)
    with torch.no_grad():
        return branch.model(input_ids=IDS).logits


def test_artifacts_load_in_a_process_without_this_package(
    llama_folder: Callable, bert_folder: Path, base_of: Callable, selection_on: Selector, tmp_path: Path
):
    cases, expected = [], []
    tied, untied, wide = llama_folder(), llama_folder(tied=False), llama_folder(hidden_size=256)
    for number, (folder, quantize, task, policy, tune) in enumerate(
        [
            (tied, "none", "completion", "last:2", "lora"),
            (tied, "none", "completion", "last:1+head", "lora"),
            (untied, "none", "completion", "all+head", "lora"),
            (wide, "nf4", "completion", "all", "lora"),
            (tied, "none", "classify", "last:2", "lora"),
            (bert_folder, "none", "classify", "last:1", "lora"),
            (tied, "none", "completion", "last:2", "full"),
            (tied, "none", "completion", "head", "full"),
            (untied, "none", "completion", "blocks:0,2+head", "full"),
            (tied, "none", "completion", "last:1+new_tokens+norms", "lora"),
            (untied, "none", "completion", "last:1+new_tokens", "lora"),
            (tied, "none", "completion", "last:1+embeddings", "full"),
            (bert_folder, "none", "classify", "last:1", "full"),
        ]
    ):
        base = base_of(folder, quantize=quantize, task=task)
        artifact = tmp_path / str(number)
        with open_branch(base, selection_on(base, policy, tune), lora_alpha=12, seed=1) as branch:
            untouched = logits_of(branch, evaluating=quantize == "none")
            saved = save_artifact(branch, artifact, learned(branch))
            expected.append(logits_of(branch, evaluating=quantize == "none"))
        assert saved == artifact / ("adapter" if tune == "lora" else "delta")
        assert not torch.allclose(untouched, expected[-1], atol=1e-3)
        cases.append(
            {"base": str(folder), "quantize": quantize, "task": task, "kind": saved.name, "artifact": str(artifact),
             "logits": str(tmp_path / f"{number}.logits")}
        )  # fmt: skip
    subprocess.run([sys.executable, "-I", "-c", PLAIN_LOAD, json.dumps(cases)], check=True, cwd=tmp_path, timeout=300)
    for case, logits in zip(cases, expected, strict=True):
        loaded = load_file(case["logits"])["logits"]
        if case["kind"] == "delta":
            assert torch.equal(loaded, logits), case
        else:  # PEFT adds the product in another order
            torch.testing.assert_close(loaded, logits, rtol=1e-5, atol=2e-5, msg=lambda text, case=case: f"{case}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("task", "quantize", "policy", "tune"),
    [
        ("completion", "none", "last:2", "lora"),
        ("completion", "none", "head", "lora"),
        ("completion", "none", "all+head", "full"),
        ("completion", "nf4", "last:2", "full"),
        ("completion", "nf4", "last:2", "lora"),
        ("classify", "none", "head", "full"),
        ("classify", "nf4", "last:1", "lora"),
    ],
)
def test_a_saved_branch_comes_back_exactly(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, tmp_path: Path,
    task: str, quantize: str, policy: str, tune: str, dtype: torch.dtype,
):  # fmt: skip
    base = base_of(llama_folder(hidden_size=256), task=task, quantize=quantize, dtype=dtype)
    before, selection = fingerprint(tensors_of(base.model)), selection_on(base, policy, tune)
    with open_branch(base, selection, lora_alpha=12, seed=1) as branch:
        save_artifact(branch, tmp_path, learned(branch))
        expected = logits_of(branch)
    with open_branch(base, selection, lora_alpha=12, seed=2) as branch:
        load_artifact(branch, tmp_path)
        assert torch.equal(logits_of(branch), expected)
    with attach_artifact(base, tmp_path) as branch:
        assert torch.equal(logits_of(branch), expected)
        rebuilt = branch.selection
        assert set(rebuilt.frozen) >= set(selection.frozen)
        same = {"policy", "tune", "lora_rank", "cut", "unties_head", "new_classifier", "num_trainable_parameters"}
        assert rebuilt.model_dump(include=same) == selection.model_dump(include=same)
    assert changed(before, fingerprint(tensors_of(base.model))) == []


def test_files_say_what_is_in_them(
    llama_folder: Callable, bert_folder: Path, base_of: Callable, selection_on: Selector, tmp_path: Path
):
    base = base_of(llama_folder())
    lora, full = selection_on(base, "last:1+head"), selection_on(base, "last:1+head", "full")
    for name, selection in (("a", lora), ("d", full)):
        with open_branch(base, selection, lora_alpha=12, seed=1) as branch:
            save_artifact(branch, tmp_path / name, {n: p.detach() for n, p in branch.learning_parameters()})
    config = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 12, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == base.load.folder
    assert set(config["target_modules"]) == {weight.removesuffix(".weight") for weight in lora.adapted}
    description = json.loads((tmp_path / "d" / "delta" / "delta.json").read_text())
    assert description["unties_head"] is True
    assert description["policy"] == "last:1+head"
    delta = load_file(tmp_path / "d" / "delta" / "delta.safetensors")
    assert set(description["trainable"]) == set(delta) == set(full.trainable), "changed tensors only"
    assert selection_of(base, tmp_path / "a")[1] == 12
    encoder = base_of(bert_folder, task="classify")
    with open_branch(encoder, selection_on(encoder, "last:1"), lora_alpha=12, seed=1) as branch:
        adapter = save_artifact(branch, tmp_path / "c", learned(branch))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["bert.pooler.dense", "classifier"])


@pytest.mark.parametrize(("tune", "name"), [("lora", "lora_A"), ("full", "mlp.up_proj.weight")])
def test_an_empty_misshapen_missing_or_broken_tensor_is_never_saved(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, tmp_path: Path, tune: str, name: str
):
    base = base_of(llama_folder())
    with open_branch(base, selection_on(base, "last:1", tune), lora_alpha=8, seed=1) as branch:
        whole = {key: parameter.detach() for key, parameter in branch.learning_parameters()}
        victim = next(key for key in whole if name in key)
        for broken, message in (
            ({**whole, victim: torch.empty(0)}, r"shape \[0\][\s\S]*gathered"),
            ({**whole, victim: whole[victim].T.contiguous()}, "expected"),
            ({key: value for key, value in whole.items() if key != victim}, "was planned but is missing"),
            ({**whole, "model.norm.weight": torch.ones(64)}, "was not planned"),
            ({**whole, victim: whole[victim] * float("nan")}, "NaN"),
        ):
            with pytest.raises(TrainingError, match=message) as caught:
                save_artifact(branch, tmp_path, broken)
            assert caught.value.where in (victim, "model.norm.weight")
            assert list(tmp_path.iterdir()) == []


def test_another_trial_s_artifact_changes_nothing(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, tmp_path: Path
):
    base = base_of(llama_folder())
    with open_branch(base, selection_on(base, "last:2"), lora_alpha=8, seed=1) as branch:
        save_artifact(branch, tmp_path, learned(branch))
    for selection in (
        selection_on(base, "last:1"),
        selection_on(base, "last:2", lora_rank=8),
        selection_on(base, "head", "full"),
    ):
        with open_branch(base, selection, lora_alpha=8, seed=2) as branch:
            before = fingerprint(branch.learning_parameters())
            with pytest.raises(IntegrityError):
                load_artifact(branch, tmp_path)
            assert fingerprint(branch.learning_parameters()) == before


def test_an_artifact_of_another_base_is_refused(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, tmp_path: Path
):
    base, other = base_of(llama_folder()), base_of(llama_folder(tied=False))
    with open_branch(base, selection_on(base, "last:2"), lora_alpha=8, seed=1) as branch:
        save_artifact(branch, tmp_path, learned(branch))
    with pytest.raises(IntegrityError, match="another base"), attach_artifact(other, tmp_path):
        pass


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_damaged_artifact_is_named_and_changes_nothing(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, tmp_path: Path, tune: str
):
    base = base_of(llama_folder())
    with open_branch(base, selection_on(base, "last:1", tune), lora_alpha=8, seed=1) as branch:
        with pytest.raises(IntegrityError, match="missing"):
            load_artifact(branch, tmp_path)
        file = next(save_artifact(branch, tmp_path, learned(branch)).glob("*.safetensors"))
        before, whole = fingerprint(branch.learning_parameters()), file.read_bytes()
        file.write_bytes(whole[:-10])
        with pytest.raises(IntegrityError, match="damaged"):
            load_artifact(branch, tmp_path)
        save_file({}, file)
        with pytest.raises(IntegrityError, match="damaged"):
            load_artifact(branch, tmp_path)
        file.unlink()
        with pytest.raises(IntegrityError, match="damaged"):
            load_artifact(branch, tmp_path)
        assert fingerprint(branch.learning_parameters()) == before


def test_a_real_base_comes_back_from_an_adapter_and_a_delta(
    real_data: Path, base_of: Callable, selection_on: Selector, tmp_path: Path
):
    base: LoadedBase = base_of(real_data / "models" / "english-7m", quantize="nf4", dtype=torch.bfloat16)
    ids = base.tokenizer("The rain fell on the town, and", return_tensors="pt").input_ids
    before = fingerprint(tensors_of(base.model))
    for policy, tune in (("last:2", "lora"), ("last:2+head", "full")):
        folder = tmp_path / tune
        with open_branch(base, selection_on(base, policy, tune), lora_alpha=8, seed=1) as branch, torch.no_grad():
            branch.model.eval()
            save_artifact(branch, folder, learned(branch))
            expected = branch.model(input_ids=ids).logits
        with attach_artifact(base, folder) as branch, torch.no_grad():
            branch.model.eval()
            assert torch.equal(branch.model(input_ids=ids).logits, expected)
    assert changed(before, fingerprint(tensors_of(base.model))) == []


def test_an_artifact_that_changed_after_it_was_committed_is_not_attached(
    llama_folder: Callable, base_of: Callable, selection_on: Selector, tmp_path: Path
):
    base = base_of(llama_folder())
    with (
        open_branch(base, selection_on(base, "last:1"), lora_alpha=8, seed=1) as branch,
        commit_folder(tmp_path / "rung") as rung,
    ):
        save_artifact(branch, rung, learned(branch))
    with attach_artifact(base, tmp_path / "rung"):
        pass
    file = next((tmp_path / "rung" / "adapter").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1  # a number of a tensor: the file is as readable as before
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="changed after it was written"), attach_artifact(base, tmp_path / "rung"):
        pass
