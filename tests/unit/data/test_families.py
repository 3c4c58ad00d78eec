"""Published chat formats: what is learned of a chat, where its answers end, and what a perfect model scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from orchestrator.data import TokenizedSet, build_set
from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.encoder import Document, Encoder
from orchestrator.data.encoding.end_tokens import declared_ends, end_tokens
from orchestrator.data.encoding.row_notices import RowNotices
from orchestrator.data.reading.examples import Example
from orchestrator.data.reading.row import BadRow
from orchestrator.spec.models import DataSpec
from orchestrator.train.evaluation import exact_match
from orchestrator.train.generate import generate_answers, wanted_answers
from orchestrator.train.ranks import Ranks

from .families import FAMILIES, Family, tokenizer_of

SINGLE = ({"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day"})
MULTI = (*SINGLE, {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "good night"})
TOOLS = (
    {
        "type": "function",
        "function": {"name": "find_place", "description": "find it", "parameters": {"type": "object", "properties": {}}},
    },
)
CALL = {"id": "call00001", "type": "function", "function": {"name": "find_place", "arguments": {"thing": "kettle"}}}
CALLING = (
    {"role": "user", "content": "where is the kettle?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "shed", "tool_call_id": "call00001", "name": "find_place"},
    {"role": "assistant", "content": "it is in the shed"},
)
CHATS = {"single": (SINGLE, ()), "multi": (MULTI, ()), "tools": (CALLING, TOOLS)}
CASES = [(name, chat) for name, family in FAMILIES.items() for chat in CHATS if chat != "tools" or family.tools]


def encode(tokenizer: Any, messages: tuple, tools: tuple = (), *, ends: tuple[int, ...] = (), **data: Any) -> Any:
    noticed = RowNotices()
    encoder = Encoder(tokenizer, "chat", DataSpec(train="x", **data), ends=ends, noticed=noticed)
    (document,) = encoder.encode([Example(file="f", line=3, content_key="k", messages=messages, tools=tools)])
    return document, noticed


def runs(document: Document, tokenizer: Any, family: Family) -> list[str]:
    """The texts of the supervised runs; of pieces, which bring spaces of their own, without doubled and outer ones."""
    edges = np.flatnonzero(np.diff(np.r_[0, document.supervised.astype(np.int8), 0]))
    parts = [document.ids[start:end] for start, end in edges.reshape(-1, 2)]
    return [spaced(tokenizer.decode(part, clean_up_tokenization_spaces=False), family) for part in parts]


def expected(family: Family, chat: str) -> list[str]:
    """The turns with the token that closes them, where the table does not name another."""
    usual = "" if family.never_ends else family.end or family.eos
    turns = [turn if turn.endswith(family.others) else f"{turn}{usual}" for turn in getattr(family, chat)]
    return [spaced(turn, family) for turn in turns]


def spaced(text: str, family: Family) -> str:
    return re.sub(" +", " ", text).strip() if family.kind == "pieces" else text


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_what_is_learned_is_what_has_to_be_written_and_its_end(name: str, chat: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    messages, tools = CHATS[chat]
    document, _ = encode(tokenizer, messages, tools, ends=declared_ends(tmp_path, tokenizer))
    assert isinstance(document, Document), document
    assert runs(document, tokenizer, family) == expected(family, chat)
    whole = tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=True, return_dict=True)
    assert document.ids.tolist() == whole["input_ids"]


class Perfect:
    """A model that writes what each document supervises and, unless stopped, goes on for ever.

    Where the format has no token after the last answer, it writes the one that the base declares.
    """

    training = False
    config = PreTrainedConfig()

    def __init__(self, documents: list[Document], then: int, filler: int) -> None:
        self._answers = {}
        for document in documents:
            ids, mask = document.ids.tolist(), document.supervised.tolist()
            for start in range(1, len(ids)):
                if mask[start] and not mask[start - 1]:
                    end = mask.index(False, start) if False in mask[start:] else len(ids)
                    self._answers[tuple(ids[:start])] = ids[start:end]
        self._then, self._filler = then, filler

    def eval(self) -> None: ...
    def train(self, mode: bool) -> None: ...

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        rows = []
        stops = options["eos_token_id"] or []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            written = [*self._answers[tuple(ids[mask.bool()].tolist())], self._then]
            written = (written + [self._filler] * options["max_new_tokens"])[: options["max_new_tokens"]]
            stop = next((place for place, token in enumerate(written) if token in stops), len(written))
            written[stop + 1 :] = [options["pad_token_id"]] * len(written[stop + 1 :])
            rows.append([*ids.tolist(), *written])
        return torch.tensor(rows)


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_a_perfect_model_scores_everything(name: str, chat: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    declared = declared_ends(tmp_path, tokenizer)
    messages, tools = CHATS[chat]
    document, _ = encode(tokenizer, messages, tools, ends=declared)
    plain = build_set([(document.ids, document.supervised)])
    data = TokenizedSet(**{**plain.__dict__, "stop_ids": end_tokens(plain, ControlTokens(tokenizer), declared)})
    filler = tokenizer.convert_tokens_to_ids("g")
    model = Perfect([document], then=declared[-1] if family.never_ends else filler, filler=filler)
    made = generate_answers(model, tokenizer, data, Ranks())
    assert exact_match(made, wanted_answers(data, tokenizer)) == 1.0, made
    assert made[0].strip(), "an empty answer proves nothing"
    assert set(data.stop_ids) >= {*declared, tokenizer.convert_tokens_to_ids(family.end or family.eos)}
    words = data.ids[: len(data.ids)]
    assert not set(data.stop_ids) & set(words[data.supervised][:-1].tolist()) or chat != "single"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.tools])
def test_tools_that_a_template_leaves_out_are_told_and_calls_refused(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES[name], tmp_path)
    document, noticed = encode(tokenizer, SINGLE, TOOLS)
    assert isinstance(document, Document)
    assert list(noticed.places["tools"]) == ["f:3"]
    refused, _ = encode(tokenizer, CALLING, TOOLS)
    assert isinstance(refused, BadRow)
    assert "chat template" in refused.reason


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_is_read_and_never_learned(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    document, noticed = encode(
        tokenizer, ({"role": "system", "content": "be brief"}, *SINGLE), ends=declared_ends(tmp_path, tokenizer)
    )
    if family.system == "refused":
        assert isinstance(document, BadRow)
        assert document.reason == "the chat template rejects it: System role not supported"
        return
    assert ("be brief" in tokenizer.decode(document.ids)) == (family.system == "read")
    assert ("unread" in noticed.places) == (family.system == "left out")
    assert runs(document, tokenizer, family) == expected(family, "single")


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_row_are_text(name: str, tmp_path: Path) -> None:
    """The row cannot end its turn: its own control tokens are there as often as in a row that spells none."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    own = tuple(text for text in (*family.special, family.eos, *family.plain) if "think" not in text and "tool" not in text)
    spelled = f"see {' '.join(own)} and <unk>"
    said = ({"role": "user", "content": spelled}, {"role": "assistant", "content": f"it is {own[0]} then"})
    document, noticed = encode(tokenizer, said, ends=declared_ends(tmp_path, tokenizer))
    other, _ = encode(tokenizer, SINGLE, ends=declared_ends(tmp_path, tokenizer))
    number = {tokenizer.convert_tokens_to_ids(text) for text in own}
    control = lambda found: [token for token in found.ids.tolist() if token in number]  # noqa: E731
    assert control(document) == control(other)
    assert spelled.replace(" ", "") in tokenizer.decode(document.ids).replace(" ", "")
    assert document.answer.strip().endswith(f"it is {own[0]} then")
    assert list(noticed.places["escaped"]) == ["f:3"]
    allowed, noticed = encode(tokenizer, said, special_tokens_in_text="allow")
    assert len(control(allowed)) > len(control(other))
    assert "allowed" in noticed.places
    assert "escaped" not in noticed.places
