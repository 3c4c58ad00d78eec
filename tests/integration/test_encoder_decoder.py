"""Encoder-decoders: trained on completions, bundled, verified, scored, and asked, with plain transformers as the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from orchestrator.anatomy.learning import Question
from orchestrator.anatomy.weights import read_weights
from orchestrator.data import TokenizedSet, load_tokenizer
from orchestrator.probe.learn import learn
from orchestrator.serve import predict
from orchestrator.serve.bundle import stage_bundle, trained_model
from orchestrator.serve.scores import score_test
from orchestrator.serve.usage import LOAD_BOTH
from orchestrator.serve.verification import verify
from orchestrator.train.model.self_test import sharpen

from .test_bundle import VOCAB, WORDS, Trials

SIDES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4},
    "bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "forced_eos_token_id": None,
    },
}


class SequenceTrials(Trials):
    """The trials of a small encoder-decoder."""

    def __init__(self, folder: Path, model_type: str) -> None:
        super().__init__(folder)
        options = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
        torch.manual_seed(7)
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **SIDES[model_type], **options))
        sharpen(model)
        (self.base / "model.safetensors.index.json").unlink()
        for file in self.base.glob("*.safetensors"):
            file.unlink()
        model.to(torch.bfloat16).save_pretrained(self.base)
        stored = read_weights(self.base)
        assert stored is not None
        found = learn(Question(folder=str(self.base), head="language_model", stored=tuple(stored.values())))
        self.anatomy = found.model_copy(update={"folder": str(self.base)})
        self.load = self.load.model_copy(update={"model_type": model_type})


@pytest.mark.parametrize("model_type", SIDES)
def test_a_bundle_reproduces_what_was_trained(tmp_path: Path, model_type: str) -> None:
    trials = SequenceTrials(tmp_path, model_type)
    inputs = trials.trial("last:2", "lora").model_copy(update={"retain_set": ""})
    staged = stage_bundle(inputs, tmp_path / "bundle")
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    assert figures.passed
    assert figures.kl_base > 0.01, "the trial moved the base, so that passing means something"
    supervised = int(TokenizedSet.load(tmp_path / "eval.npz").num_supervised.sum())
    assert figures.num_tokens == supervised, "of each document the completion alone is compared"
    config = json.loads((staged.folder / "config.json").read_text())
    assert config["architectures"] == [trials.anatomy.architecture]
    adapter = json.loads((staged.folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    scores = score_test(staged.folder, inputs, tmp_path / "scores", num_prompts=2, generated_tokens=8)
    promoted = next(each for each in scores.models if each.model == "promoted")
    assert promoted.metrics["loss"] == pytest.approx(plain_loss(staged.folder, tmp_path / "test.npz"), rel=0.02)
    assert len(scores.prompts) == 2
    assert answers_alone_and_together_agree(staged.folder)


def answers_alone_and_together_agree(bundle: Path) -> bool:
    """Ask a short and a long question at once, and compare with plain transformers, one prompt at a time."""
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(bundle).float().eval()
    tokenizer = load_tokenizer(bundle)
    predictor = predict.Predictor(model, tokenizer, "completion", "", "bundle", frozenset({2}), 64)
    texts = [WORDS[4], " ".join(WORDS[5:16])]
    together = [answer.text for answer in predictor.answer([predict.Question(text) for text in texts], 6)]
    alone: list[str] = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 2]])
        output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        alone.append(tokenizer.decode(output[0], skip_special_tokens=True))
    assert together == alone
    return True


@torch.no_grad()
def plain_loss(bundle: Path, data: Path) -> float:
    """Return the loss of a set's completions as plain transformers computes it from `labels`."""
    assert "AutoModelForSeq2SeqLM" in LOAD_BOTH
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(bundle, dtype=torch.bfloat16)
    documents, losses, tokens = TokenizedSet.load(data), 0.0, 0
    for index in range(len(documents)):
        ids, supervised = documents.document(index)
        prompt, answer = (torch.tensor(part.astype("int64"))[None] for part in (ids[~supervised], ids[supervised]))
        losses += float(model(input_ids=prompt, labels=answer).loss) * answer.shape[1]
        tokens += answer.shape[1]
    return losses / tokens
