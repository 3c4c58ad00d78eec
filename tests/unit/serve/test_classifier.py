"""The files that a classifier's bundle has besides its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from orchestrator.data import load_tokenizer
from orchestrator.errors import VerificationError
from orchestrator.samples import SAMPLE_BASE
from orchestrator.serve.classifier import escapes_control_tokens, write_tokenizer
from orchestrator.work.execution import Padding


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(SAMPLE_BASE) / name, tmp_path / name)
    return tmp_path


def test_the_tokenizer_pads_and_reads_texts_as_training_did(folder: Path) -> None:
    before = AutoTokenizer.from_pretrained(folder)
    user = Padding(token_id=before.convert_tokens_to_ids("<|user|>"), token="<|user|>")
    assert before.pad_token_id != user.token_id
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": before.pad_token}))
    text = f"a text {user.token}"
    assert before(text)["input_ids"][-1] == user.token_id
    write_tokenizer(folder, user, escape=True)
    after = AutoTokenizer.from_pretrained(folder)
    assert (after.pad_token, after.pad_token_id) == (user.token, user.token_id)
    assert after(text)["input_ids"][-1] != user.token_id
    assert after("a text")["input_ids"] == before("a text")["input_ids"]
    shutil.copy(Path(SAMPLE_BASE) / "tokenizer_config.json", folder / "tokenizer_config.json")
    write_tokenizer(folder, user, escape=False)
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"][-1] == user.token_id


def test_a_tokenizer_that_pads_with_another_token_is_an_error(folder: Path) -> None:
    wrong = Padding(token_id=load_tokenizer(folder).pad_token_id, token="<|user|>")
    with pytest.raises(VerificationError, match=r"the bundle's tokenizer pads with '<\|user\|>'"):
        write_tokenizer(folder, wrong, escape=True)


def test_control_tokens_are_text_unless_the_spec_allows_them() -> None:
    assert escapes_control_tokens({})
    assert escapes_control_tokens({"data": {"special_tokens_in_text": "escape"}})
    assert not escapes_control_tokens({"data": {"special_tokens_in_text": "allow"}})
