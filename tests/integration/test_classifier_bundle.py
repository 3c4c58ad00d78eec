"""A classifier's bundle is what was trained, document by document, whatever it reads and however it is served."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.anatomy import Pooling, read_anatomy, with_pooling
from orchestrator.api import Bundle
from orchestrator.errors import VerificationError
from orchestrator.serve import (
    BundleInputs,
    StagedBundle,
    commit_bundle,
    document_scores,
    require_passed,
    score_test,
    stage_bundle,
    trained_model,
    verify,
    verify_bundle,
)
from orchestrator.serve.predict import Question, open_predictor
from orchestrator.transfer.records import TransferReport
from orchestrator.work.execution import Padding

from .test_bundle import CLASSES, Trials

END = Padding(token_id=2, token="</s>")


def classifiers(folder: Path, kind: Any, *, encoder: bool, padding: Padding | None = END, quantize: str = "none") -> Trials:
    trials = Trials(folder, task="classify", encoder=encoder, quantize=quantize)
    trials.anatomy = with_pooling(read_anatomy(trials.base, need_weights=True), Pooling(kind=kind))
    trials.load = trials.load.model_copy(update={"pooling": trials.anatomy.pooling, "padding": padding})
    return trials


def bundle(trials: Trials, folder: Path, policy: str = "last:1", tune: str = "lora") -> tuple[BundleInputs, StagedBundle]:
    inputs = trials.trial(policy, tune, spec={"task": "classify", "data": {}})
    return inputs, stage_bundle(inputs, folder / "bundle")


@pytest.mark.parametrize(
    ("kind", "encoder", "policy", "tune"),
    [
        ("mean", True, "last:1", "lora"),
        ("cls", True, "head", "full"),
        ("last", True, "last:1", "full"),
        ("mean", False, "last:1", "lora"),
    ],
)
def test_a_head_file_serves_what_no_class_does(tmp_path: Path, kind: str, encoder: bool, policy: str, tune: str) -> None:
    trials = classifiers(tmp_path, kind, encoder=encoder)
    inputs, staged = bundle(trials, tmp_path, policy, tune)
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert figures.passed
    assert figures.num_prompts == 40
    assert figures.classified is not None
    assert figures.classified.num_other_answers == 0
    assert figures.classified.largest_kl < 0.1 * figures.classified.limit
    # The encoder is a plain model of transformers, and the loader a plain script.
    model, loading = AutoModel.from_pretrained(staged.folder, output_loading_info=True)
    assert json.loads((staged.folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert [name for name in loading["missing_keys"] if "pooler" not in name] == []
    scores = score_test(staged.folder, inputs, tmp_path / "test", device="cpu")
    bundled = commit_bundle(staged, inputs, TransferReport(verification=figures, scores=scores.models))
    test = trials.folder / "test.npz"
    predictions = document_scores(tmp_path / "test", "promoted").predictions
    predictor = open_predictor(bundled)
    texts = [predictor.tokenizer.decode(each, skip_special_tokens=True) for each in _documents(test, 12)]
    answers = predictor.answer([Question(text) for text in texts], 1)
    assert predictions is not None
    assert [answer.text for answer in answers] == [CLASSES[label] for label in predictions[:12]]
    assert verify_bundle(bundled).passed
    assert not (bundled / "__pycache__").exists()
    model, tokenizer = Bundle(bundled).load()
    logits = model(**tokenizer(texts[0], return_tensors="pt", return_token_type_ids=False)).logits
    assert model.config.id2label[int(logits.argmax())] == answers[0].text


def test_the_code_of_its_card_runs_and_its_cache_is_not_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    trials = classifiers(tmp_path, "mean", encoder=True)
    inputs, staged = bundle(trials, tmp_path)
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    bundled = commit_bundle(staged, inputs, TransferReport(verification=figures))
    (code,) = re.findall(r"```python\n(.*?)```", (bundled / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(bundled)
    monkeypatch.syspath_prepend(str(bundled))
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    exec(code, {})
    assert any(name in capsys.readouterr().out for name in CLASSES)
    assert (bundled / "__pycache__").exists()
    assert verify_bundle(bundled).passed


def _documents(file: Path, count: int) -> list[list[int]]:
    from orchestrator.data import TokenizedSet

    data = TokenizedSet.load(file)
    return [data.document(index)[0].tolist() for index in range(count)]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_transformers_own_class_pads_with_the_token_of_training(tmp_path: Path, quantize: str) -> None:
    trials = classifiers(tmp_path, "class", encoder=False, quantize=quantize)
    inputs, staged = bundle(trials, tmp_path)
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert figures.passed
    assert figures.classified is not None
    assert figures.classified.largest_kl < 0.1 * figures.classified.limit
    model = AutoModelForSequenceClassification.from_pretrained(staged.folder)
    tokenizer = AutoTokenizer.from_pretrained(staged.folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.split_special_tokens
    texts = ["w3 w4 w5", "w9", "w8 w7 w6 w5 w4 w3"]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits
        alone = [model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_a_padding_token_that_ends_texts_is_found_though_the_mean_passes(tmp_path: Path) -> None:
    """Two of forty documents end in `w0`, which the bundle's config takes for padding."""
    trials = classifiers(tmp_path, "class", encoder=False)
    inputs, staged = bundle(trials, tmp_path)
    assert verify(staged.folder, trained_model(inputs, staged.plan)).passed
    config = json.loads((staged.folder / "config.json").read_text())
    ends = [ids[-1] for ids in _documents(tmp_path / "eval.npz", 40)]
    (staged.folder / "config.json").write_text(json.dumps(config | {"pad_token_id": ends[3]}))
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert figures.classified is not None
    assert not figures.classified.passed
    assert not figures.passed
    wrong = figures.model_copy(update={"kl_bundle": 0.0})
    with pytest.raises(VerificationError, match=r"the largest KL\(trained \|\| bundle\) of a document is"):
        require_passed(wrong, staged.folder)


def test_a_bundle_of_an_older_version_is_verified_as_before(tmp_path: Path) -> None:
    """Its record says nothing of pooling and padding, and its tokenizer is the base's."""
    trials = classifiers(tmp_path, "class", encoder=False, padding=None)
    inputs, staged = bundle(trials, tmp_path)
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    bundled = commit_bundle(staged, inputs, TransferReport(verification=figures))
    manifest = json.loads((bundled / "manifest.json").read_text())
    for key in ("pooling", "padding"):
        del manifest["about"]["base"]["load"][key]
    del manifest["about"]["verification"]["classified"]
    (bundled / "manifest.json").write_text(json.dumps(manifest))
    assert verify_bundle(bundled).passed
    base, own = ((folder / "tokenizer_config.json").read_bytes() for folder in (trials.base, bundled))
    assert own == base
