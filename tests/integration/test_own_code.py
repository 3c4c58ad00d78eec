"""A base of a type that transformers does not have: from its pinned code to a verified bundle that brings this code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.anatomy import read_anatomy, select
from orchestrator.anatomy.own_code import code_sha256
from orchestrator.bases.own_code import CONSENT, use_own_code
from orchestrator.data import build_set
from orchestrator.errors import BaseError, UsageError
from orchestrator.serve import BundleInputs, commit_bundle, stage_bundle, trained_model, verify, verify_bundle
from orchestrator.serve.predict import open_predictor
from orchestrator.train.adapters.artifacts import save_artifact
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.model.base import load_base
from orchestrator.transfer.records import TransferReport
from orchestrator.work.execution import BaseLoad
from orchestrator.work.trial import TrialSpec
from tests.own_code import write_own_base


def trained(folder: Path) -> BundleInputs:
    """Write a base, pin its code, and train nothing but noise into an adapter on it."""
    base = write_own_base(folder / "base")
    (base / "zero_to_fp32.py").write_text("# a script that other bundles leave out\n")
    pinned = code_sha256(base)
    use_own_code(base, pinned)
    anatomy = read_anatomy(base, need_weights=True)
    load = BaseLoad(folder=str(base), model_type="own_llama", quantize="none", task="completion", code_sha256=pinned)
    selection = select(anatomy, "last:2", "lora", 4, task="completion")
    trial = TrialSpec(
        trial_id="t000-abcdef",
        number=0,
        layers="last:2",
        tune="lora",
        learning_rate=1e-3,
        lora_rank=4,
        total_steps=10,
        total_tokens=1000,
        seed=0,
    )
    whole = load_base(load, anatomy, dtype=torch.bfloat16, device=torch.device("cpu"))
    rung = folder / "rung-0"
    rung.mkdir()
    with open_branch(whole, selection, lora_alpha=trial.lora_alpha, seed=0) as branch:
        for _, parameter in branch.learning_parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        save_artifact(branch, rung, {name: parameter.data for name, parameter in branch.learning_parameters()})
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (12,), generator=random).int().numpy() for _ in range(10)]
    documents = build_set([(row, row > 0) for row in rows], prompts=["w1"] * 10, answers=["w2"] * 10)
    documents.save(folder / "documents.npz")
    return BundleInputs(
        name="own",
        base_name=str(base),
        base=load,
        anatomy=anatomy,
        trial=trial,
        selection=selection,
        artifact=str(rung),
        data_sha256="d" * 64,
        spec={"task": "completion", "data": {}},
        train_set=str(folder / "documents.npz"),
        eval_set=str(folder / "documents.npz"),
        test_set=str(folder / "documents.npz"),
    )


def test_a_bundle_with_its_bases_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = trained(tmp_path)
    pinned = inputs.base.code_sha256
    staged = stage_bundle(inputs, tmp_path / "bundle")
    assert code_sha256(staged.folder) == pinned
    assert "auto_map" in json.loads((staged.folder / "config.json").read_text())
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert figures.passed
    assert figures.kl_base > 1e-3, "the trial moved the base"
    bundle = commit_bundle(staged, inputs, TransferReport(verification=figures))
    card = (bundle / "README.md").read_text()
    assert pinned in card
    assert 'from_pretrained(".", trust_remote_code=True)' in card
    assert "vllm serve . --trust-remote-code" in card

    # Whoever made a bundle wrote its manifest too: it runs no code where the user does not say so.
    for consent in ("", "0" * 64):
        monkeypatch.setenv(CONSENT, consent)
        with pytest.raises(UsageError, match="brings code") as raised:
            verify_bundle(bundle)
        assert f"{CONSENT}={pinned}" in raised.value.expected
        with pytest.raises(UsageError, match="brings code"):
            open_predictor(bundle)
    monkeypatch.setenv(CONSENT, pinned)
    assert verify_bundle(bundle).passed
    predictor = open_predictor(bundle)
    assert type(predictor.model).__name__ == "OwnForCausalLM"

    # The consent is for this code: not for other code in a bundle that claims to have it.
    other = shutil.copytree(staged.final, tmp_path / "other")
    with (other / "modeling_own.py").open("a") as file:
        file.write("raise SystemExit('other code ran')\n")
    with pytest.raises(BaseError, match="has the hash"):
        verify(other, trained_model(inputs, staged.plan))
