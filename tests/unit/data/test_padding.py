"""The padding token of a classifier ends no text, whatever config and tokenizer say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orchestrator.data import build_set, load_tokenizer
from orchestrator.data.encoding.padding import choose_padding, odd_documents
from orchestrator.errors import BaseError
from orchestrator.spec.models import DataSpec

DATA = DataSpec(train="x.csv")


def write(
    folder: Path, special: list[str], *, appended: str = "", prepended: str = "", config: dict[str, Any], **named: str
) -> Path:
    """A byte-level tokenizer whose token 0 is `!`, with these special tokens from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet.remove("!")
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(["!", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if appended or prepended:
        used = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys([prepended, appended]) if text]
        template = " ".join(part for part in (prepended, "$A", appended) if part)
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 256 + len(special)} | config))
    return folder


def chosen(folder: Path, *, fixed: bool = False, rows: int = 300, ends: int = 40) -> tuple[int, str]:
    sets = [build_set([(np.array([5, ends]), np.zeros(2, bool))], labels=[0])]
    found = choose_padding(folder, DATA, sets, fixed=fixed, rows=rows)
    return found.token_id, found.token


def test_token_0_is_an_exclamation_mark(tmp_path: Path) -> None:
    """Llama 3: `eos_token_id` is a list, there is no padding token, and token 0 ends many a text."""
    special, named = ["<bos>", "<eot>", "<end>"], {"bos_token": "<bos>", "eos_token": "<eot>"}
    folder = write(tmp_path, special, config={"eos_token_id": [258, 257]}, **named)
    assert chosen(folder) == (257, "<eot>")
    assert chosen(folder, ends=257) == (258, "<end>"), "a document ends in it"
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 259, "pad_token_id": 0}))
    assert chosen(folder) == (257, "<eot>"), "config.json may name a token of ordinary text"


def test_the_tokenizer_appends_the_end_token_which_is_also_the_padding(tmp_path: Path) -> None:
    """Qwen3-Embedding."""
    named = {"eos_token": "<end>", "pad_token": "<end>"}
    folder = write(tmp_path, ["<end>", "<|vision_pad|>", "<|reserved_3|>"], appended="<end>", config={}, **named)
    assert chosen(folder) == (258, "<|reserved_3|>")
    assert chosen(folder, rows=258) == (257, "<|vision_pad|>"), "the embedding has no row for the other one"


def test_what_config_and_tokenizer_say_is_kept_where_it_can_be(tmp_path: Path) -> None:
    folder = write(tmp_path, ["<bos>", "<pad>", "<end>"], config={"pad_token_id": 258}, pad_token="<pad>", eos_token="<end>")
    assert chosen(folder) == (258, "<end>")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "pad_token_id": -1}))
    assert chosen(folder) == (257, "<pad>")


def test_the_end_token_pads_where_nothing_else_does_and_texts_may_spell_it(tmp_path: Path) -> None:
    """GPT-2 and Llama 2: the tokenizer does not append it, and a text that spells it is a text."""
    folder = write(tmp_path, ["<s>", "</s>"], prepended="<s>", config={"pad_token_id": None}, bos_token="<s>", eos_token="</s>")
    assert chosen(folder) == (257, "</s>")


def test_no_token_is_left(tmp_path: Path) -> None:
    folder = write(tmp_path, ["<end>"], appended="<end>", config={"pad_token_id": 0}, eos_token="<end>", pad_token="<end>")
    with pytest.raises(BaseError, match=r"'!' \(0\) is not a special token.*'<end>' \(256\) ends every text") as found:
        chosen(folder)
    assert found.value.exit_code == 2
    assert "name an unused special token as pad_token" in found.value.remedy


def test_an_encoder_keeps_its_own(tmp_path: Path) -> None:
    """RoBERTa's class numbers positions by it, and finds no position with it."""
    folder = write(tmp_path, ["<s>"], appended="<s>", config={"model_type": "roberta", "pad_token_id": 1})
    assert chosen(folder, fixed=True)[0] == 1


def test_odd_texts_end_in_what_is_mistaken_and_never_in_a_control_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, ["<pad>", "<end>"], prepended="<pad>", config={}, pad_token="<pad>"))
    documents = odd_documents(tokenizer)
    assert {ids[-1] for ids in documents} >= {0}
    assert all(ids[-1] < 256 for ids in documents), "a control token in a text is text"
    assert min(map(len, documents)) == 2
    assert max(map(len, documents)) > 900
    assert len(odd_documents(tokenizer, escape=False)) < len(documents)
