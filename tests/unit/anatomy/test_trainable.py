"""Every layout that says it can be trained: saved, read, loaded, unfrozen and trained a step by the real parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from orchestrator.anatomy import known_layouts, read_anatomy, select, trainable_layouts
from orchestrator.anatomy.layouts import LAYOUTS
from orchestrator.data import TokenizedSet, build_set
from orchestrator.plan.merge import make_merge_plan
from orchestrator.serve.bundle import bundle_config
from orchestrator.serve.merging import merge
from orchestrator.spec.models import Task, Tune
from orchestrator.train.adapters.artifacts import save_artifact
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.train.model.objective import Objective, final_norm_of
from orchestrator.work.execution import BaseLoad

from .bases import config_of

CPU = torch.device("cpu")
DECODERS = [name for name in trainable_layouts() if LAYOUTS[name].kind == "decoder"]
ENCODERS = [name for name in trainable_layouts() if LAYOUTS[name].kind == "encoder"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each layout, large enough in its weights that attention matters, as `save_pretrained` writes it."""
    folders: dict[str, Path] = {}
    for name in trainable_layouts():
        window = {"sliding_window": 8} if name in ("mistral", "phi3", "gemma3_text") else {}
        config = AutoConfig.for_model(**config_of(name, initializer_range=0.3, dtype="float32", **window))
        kind = AutoModelForMaskedLM if LAYOUTS[name].kind == "encoder" else AutoModelForCausalLM
        torch.manual_seed(3)
        folders[name] = tmp_path_factory.mktemp(name)
        kind.from_config(config).save_pretrained(folders[name])
    return folders


def load(folder: Path, task: Task, quantize: str = "none") -> LoadedBase:
    anatomy = read_anatomy(folder, need_weights=True)
    classes = {"num_classes": 3, "class_names": ("low", "mid", "high")} if task == "classify" else {}
    values = {"folder": str(folder), "model_type": anatomy.model_type, "quantize": quantize, "task": task, **classes}
    return load_base(BaseLoad.model_validate(values), anatomy, dtype=torch.float32, device=CPU)


def documents(lengths: list[int], labels: list[int] | None = None) -> TokenizedSet:
    generator = np.random.default_rng(0)
    pairs = [(generator.integers(3, 40, size=n), np.arange(n) >= n // 2) for n in lengths]
    return build_set(pairs, labels=labels)


def objective_of(base: LoadedBase) -> Objective:
    head = base.anatomy.classifier_weight if base.load.task == "classify" else base.anatomy.head_weight
    parts = (base.model.get_submodule(base.anatomy.backbone), base.model.get_submodule(head.rpartition(".")[0]))
    norm = final_norm_of(base.model, base.anatomy)
    return Objective(base.model, *parts, base.load.task, encoder=base.anatomy.kind == "encoder", final_norm=norm)


def test_what_is_trainable_is_told_apart() -> None:
    plan_only = {"gpt2", "opt", "gemma2", "mixtral", "qwen2_moe", "qwen3_moe", "vit"}
    assert set(known_layouts()) - set(trainable_layouts()) == plan_only


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_have_the_losses_of_lone_ones(folders: dict[str, Path], name: str) -> None:
    base = load(folders[name], "text")
    base.model.eval()
    data = documents([9, 14, 7, 20])
    (batch,) = RowPlan(32, 4, pack=True).batches(data, np.arange(len(data)))
    assert len(batch.input_ids) < len(data), "nothing was packed"
    scored = objective_of(base)(**to_tensors(batch, CPU), each=True)
    for index in range(len(data)):
        ids, supervised = data.document(index)
        row = torch.from_numpy(ids.astype(np.int64))
        logits = base.model(input_ids=row[None]).logits[0, :-1].float()
        alone = functional.cross_entropy(logits, row[1:], reduction="none")[torch.from_numpy(supervised[1:])]
        torch.testing.assert_close(scored.losses[scored.document_ids == index], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", trainable_layouts())
def test_the_linears_of_the_table_are_what_nf4_quantizes(folders: dict[str, Path], name: str) -> None:
    base = load(folders[name], "text" if name in DECODERS else "classify", "nf4")
    quantized = {key for key, parameter in base.model.named_parameters() if hasattr(parameter, "quant_state")}
    assert quantized == {key for block in base.anatomy.linears for key in block}


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    ("name", "task"),
    [*((name, "text") for name in DECODERS), *((name, "classify") for name in (*ENCODERS, "llama", "phi", "gpt_neox"))],
)
def test_a_branch_on_the_last_block_learns(folders: dict[str, Path], name: str, task: Task, tune: Tune) -> None:
    base = load(folders[name], task)
    classes = 3 if task == "classify" else 0
    for policy in ("last:1", "last:1+head" if task == "text" else "head"):
        selection = select(base.anatomy, policy, tune, 4 if tune == "lora" else None, task=task, num_classes=classes)
        with open_branch(base, selection, lora_alpha=8, seed=0) as branch:
            parts, encoder = (branch.backbone(), branch.head()), base.anatomy.kind == "encoder"
            norm = final_norm_of(branch.model, base.anatomy)
            objective = Objective(branch.model, *parts, task, encoder=encoder, final_norm=norm)
            data = documents([9, 14], labels=[0, 2] if task == "classify" else None)
            (batch,) = RowPlan(32, 4, pack=task == "text").batches(data, np.arange(2))
            objective(**to_tensors(batch, CPU)).backward()
            learning = branch.learning_parameters()
            assert all(parameter.grad is not None for _, parameter in learning)
            trained = [key for key, parameter in learning if parameter.grad is not None and parameter.grad.any()]
            still = {key for key, _ in learning} - set(trained)
            assert all(key.endswith("lora_A.weight") or ".key" in key or "k_proj.bias" in key for key in still), still


@pytest.mark.parametrize(
    ("name", "task", "policy", "tune"),
    [
        *((name, "text", "last:1+head", tune) for name in DECODERS for tune in ("lora", "full")),
        *((name, "classify", "last:1", tune) for name in (*ENCODERS, "phi", "gpt_neox") for tune in ("lora", "full")),
    ],
)
def test_the_merged_model_is_the_trained_one(
    folders: dict[str, Path], tmp_path: Path, name: str, task: Task, policy: str, tune: Tune
) -> None:
    base = load(folders[name], task)
    classes = 3 if task == "classify" else 0
    selection = select(base.anatomy, policy, tune, 4 if tune == "lora" else None, task=task, num_classes=classes)
    ids = torch.arange(3, 19)[None]
    generator = torch.Generator().manual_seed(1)
    base.model.eval()
    with open_branch(base, selection, lora_alpha=8, seed=0) as branch, torch.no_grad():
        before = branch.model(input_ids=ids).logits
        for _, parameter in branch.learning_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        trained = branch.model(input_ids=ids).logits
        (tmp_path / "trial").mkdir()
        save_artifact(branch, tmp_path / "trial", {key: value.detach() for key, value in branch.learning_parameters()})
    assert (trained - before).abs().max() > 1e-2
    plan = make_merge_plan(base.anatomy, tmp_path / "trial", base.load, selection, held_dtype="float32")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    merge(plan, bundle)
    config = bundle_config(json.loads((folders[name] / "config.json").read_bytes()), plan)
    (bundle / "config.json").write_text(json.dumps(config))
    kind = AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM
    with torch.no_grad():
        merged = kind.from_pretrained(bundle, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
