"""Tokens of the data and the rows that the base has for them, on real tokenizers and saved weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from orchestrator.anatomy import read_anatomy
from orchestrator.data import DataSummary, prepare_data
from orchestrator.errors import DataError
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import load_spec

TOKENS = ["<call>", "<result>"]


def base_with_added_tokens(folder: Path, *, resized: bool) -> Path:
    """A Llama of random weights beside the sample's tokenizer with two more tokens, with or without rows for them."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLE_BASE / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
        )
    )
    tokenizer.add_tokens(TOKENS)
    if resized:
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared(base: Path, folder: Path, *, layers: str = "last:1", allow: str = "allow") -> DataSummary:
    rows = [{"prompt": f"question {number}", "completion": f"<call> answer {number}"} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "spec.yaml").write_text(
        f"name: tokens\nbase: {{model: {base}}}\ntask: completion\n"
        f"data: {{train: rows.jsonl, special_tokens_in_text: {allow}}}\n"
        f"finetune: {{layers: '{layers}', tune: full, learning_rate: 1e-3}}\n"
    )
    anatomy = read_anatomy(base, need_weights=True)
    return prepare_data(load_spec(folder / "spec.yaml"), base, folder / "data", anatomy=anatomy)


@pytest.mark.parametrize("allow", ["allow", "escape"])
def test_a_token_without_a_row_is_an_error_that_names_token_and_rows(tmp_path: Path, allow: str):
    base = base_with_added_tokens(tmp_path / "base", resized=False)
    first = read_anatomy(base, need_weights=True).vocab_size
    with pytest.raises(DataError, match=rf"'<call>' is {first}, in rows.jsonl:1, rows.jsonl:2.* and 37 more") as caught:
        prepared(base, tmp_path, allow=allow)
    assert "<result>" not in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("layers", "warned"), [("last:1", True), ("all+norms", True), ("last:1+embeddings", False), ("head", False)]
)
def test_untrained_rows_of_supervised_tokens_are_a_warning(tmp_path: Path, layers: str, warned: bool):
    base = base_with_added_tokens(tmp_path / "base", resized=True)
    told = [notice.line for notice in prepared(base, tmp_path, layers=layers).notices if "cannot learn" in notice.message]
    assert len(told) == warned
    if warned:
        assert "'<call>' in 32" in told[0]
        assert "'<result>'" not in told[0]
