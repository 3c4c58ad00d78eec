"""A chat model of each kind of format, trained, merged, and asked by plain transformers: it answers and stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import TokenizedSet, prepare_data
from orchestrator.serve import BundleInputs, score_test, stage_bundle
from orchestrator.spec import load_spec
from orchestrator.train.adapters.artifacts import save_artifact
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.model.base import load_base
from orchestrator.work.execution import BaseLoad
from orchestrator.work.trial import TrialSpec

from .families import FAMILIES, base_of

PLACES = ("shed", "attic", "cellar")
CHATS = [
    [{"role": "user", "content": f"where is kettle {n}?"}, {"role": "assistant", "content": f"good, in the {PLACES[n]}"}]
    for n in range(3)
]
TRIAL = {"trial_id": "t000-abcdef", "number": 0, "layers": "all+head", "tune": "full", "learning_rate": 1e-2, "seed": 0}


def make_base(folder: Path, name: str) -> Path:
    base_of(FAMILIES[name], folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    own = (folder / "generation_config.json").read_bytes()
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(own)
    return folder


def prepared(folder: Path, base: Path) -> TokenizedSet:
    """The three chats, as train, eval and test alike: here it is only asked whether what was learned is said."""
    for number, name in enumerate(("train", "eval", "test")):
        rows = [[{**turns[0], "content": turns[0]["content"] + " " * number}, turns[1]] for turns in CHATS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    data = {"train": "train.jsonl", "eval": "eval.jsonl", "test": "test.jsonl", "dedupe": "none"}
    values = {"name": "t", "base": {"model": str(base)}, "task": "chat", "data": data, "finetune": {}}
    (folder / "spec.yaml").write_text(json.dumps(values))
    prepare_data(load_spec(folder / "spec.yaml"), base, folder / "data")
    return TokenizedSet.load(folder / "data" / "train.npz")


def learned(data: TokenizedSet, model: Any, parameters: list[torch.nn.Parameter]) -> float:
    """Train until the supervised tokens are known by heart; the last loss."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    pairs = [tuple(map(torch.from_numpy, data.document(index))) for index in range(len(data))]
    ids = torch.nn.utils.rnn.pad_sequence([ids.long() for ids, _ in pairs], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([mask for _, mask in pairs], batch_first=True)
    loss = torch.tensor(9.0)
    for _ in range(400):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:]].float(), ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 5e-3:
            break
    return loss.item()


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "gemma", "mistral-v1", "phi3"])
def test_a_trained_chat_model_answers_and_stops_under_plain_transformers(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name)
    if name == "gemma":
        (base / "generation_config.json").unlink()
    data = prepared(tmp_path, base)
    anatomy = read_anatomy(base, need_weights=True)
    load = BaseLoad(folder=str(base), model_type=anatomy.model_type, quantize="none", task="chat")
    selection = select(anatomy, "all+head", "full", None, task="chat")
    rung = tmp_path / "rung-0"
    rung.mkdir()
    whole = load_base(load, anatomy, dtype=torch.float32, device=torch.device("cpu"))
    with open_branch(whole, selection, lora_alpha=16, seed=0) as branch:
        parameters = dict(branch.learning_parameters())
        assert learned(data, branch.model, list(parameters.values())) < 0.05
        save_artifact(branch, rung, {key: parameter.data for key, parameter in parameters.items()})
    inputs = BundleInputs(
        name="t",
        base_name=str(base),
        base=load,
        anatomy=anatomy,
        trial=TrialSpec.model_validate(TRIAL | {"total_steps": 1, "total_tokens": 1}),
        selection=selection,
        artifact=str(rung),
        held_dtype="float32",
        train_set=str(tmp_path / "data" / "train.npz"),
        eval_set=str(tmp_path / "data" / "eval.npz"),
        test_set=str(tmp_path / "data" / "train.npz"),
        data_sha256="d" * 64,
    )
    bundle = stage_bundle(inputs, tmp_path / "bundle").folder
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    for asked, answer in CHATS:
        given = tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**given, do_sample=False, max_new_tokens=100)[0, given["input_ids"].shape[1] :]
        assert int(written[-1]) == data.stop_ids[0]
        assert len(written) < 100
        assert tokenizer.decode(written, skip_special_tokens=True).split("</think>")[-1].strip() == answer["content"]
    promoted, untouched = score_test(bundle, inputs, tmp_path / "scores", device="cpu").models
    assert (promoted.metrics["exact_match"], untouched.metrics["exact_match"]) == (1.0, 0.0)
