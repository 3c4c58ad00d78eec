"""Which tokens end an answer, what is said of them, and that they go with the sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data import TokenizedSet, build_set, joined, load_tokenizer, padding, shuffled, with_shots
from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.end_tokens import declared_ends, end_tokens

from .families import FAMILIES, base_of

NO_TOKENS = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}


def of(*documents: list[tuple[int, int]]) -> TokenizedSet:
    """Documents of (token, whether it is supervised)."""
    return build_set([(np.asarray([i for i, _ in pairs]), np.asarray([bool(s) for _, s in pairs])) for pairs in documents])


def test_ends_are_control_tokens_at_the_end_of_what_is_supervised(tokenizer: Any) -> None:
    control = ControlTokens(tokenizer)
    data = of([(9, 0), (8, 1), (2, 1), (4, 0), (8, 1), (2, 1)], [(9, 0), (8, 1), (5, 1)], [(9, 0), (8, 1), (7, 1)])
    assert end_tokens(data, control, (1,)) == (2, 5, 1)
    within = of([(9, 0), (5, 1), (8, 1), (2, 1)], [(9, 0), (8, 1), (5, 1)])
    assert end_tokens(within, control, ()) == (2,), "a token within an answer does not end it"
    borders = of([(9, 1), (2, 1)], [(8, 1), (7, 1)])
    assert end_tokens(borders, control, ()) == (2,), "the next document is another answer"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 2]}, {"eos_token_id": 4}, (2, 5)),
        ({"eos_token_id": 4}, {}, (2, 4)),
        ({"max_length": 9}, {"eos_token_id": 4}, (2,)),
        (None, {"eos_token_id": [4]}, (2, 4)),
        (None, {"eos_token_id": None}, (2,)),
        (None, {"eos_token_id": 10**6}, (2,)),
    ],
)
def test_a_base_declares_its_ends(
    generation: Any, config: Any, expected: tuple[int, ...], tokenizer: Any, tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert declared_ends(tmp_path, tokenizer) == expected


def test_stop_ids_go_with_the_documents(tmp_path: Path) -> None:
    data = replace(of([(9, 0), (8, 1), (2, 1)], [(7, 0), (6, 1), (2, 1)]), stop_ids=(2, 5))
    data.save(tmp_path / "set.npz")
    again = TokenizedSet.load(tmp_path / "set.npz")
    others = (
        again,
        again.select(np.asarray([1])),
        shuffled(again, 0),
        joined(again, again),
        with_shots(again, again, 1, 9, 0).data,
    )
    assert [other.stop_ids for other in others] == [(2, 5)] * 5
    assert again.sha256 == replace(data, stop_ids=()).sha256


def test_there_is_always_something_to_pad_with(tokenizer: Any) -> None:
    class Bare:
        pad_token_id = None
        eos_token_id = None

    assert padding(tokenizer, (7,)) == tokenizer.pad_token_id
    assert padding(Bare(), (7, 8)) == 7
    assert padding(Bare(), ()) == 0


def chats(prepare: Any, count: int = 30) -> None:
    turns = [[{"role": "user", "content": f"number {n}?"}, {"role": "assistant", "content": f"it is {n}"}] for n in range(count)]
    prepare.jsonl("train.jsonl", [{"messages": each} for each in turns])


def test_the_end_of_a_chats_turns_is_found_told_and_stored(prepare: Any, tmp_path: Path) -> None:
    prepare.base = base_of(FAMILIES["chatml"], tmp_path / "base")
    chats(prepare)
    summary = prepare.run("chat")
    tokenizer = load_tokenizer(prepare.base)
    expected = tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert summary.stop_token_ids == expected
    assert {prepare.load(name).stop_ids for name in ("train", "eval", "test")} == {expected}
    (told,) = [notice for notice in summary.notices if "answers end with" in notice.message]
    assert told.level == "info"
    assert told.message.startswith("answers end with '<|im_end|>': generation stops there and at '<|endoftext|>'")
    (prepare.base / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert 5 in prepare.run("chat").stop_token_ids, "another declaration is another input"


@pytest.mark.parametrize("name", ["falcon", "glm4"])
def test_a_template_that_never_ends_an_answer_is_warned_of(name: str, prepare: Any, tmp_path: Path) -> None:
    prepare.base = base_of(FAMILIES[name], tmp_path / "base")
    chats(prepare)
    warnings = [notice for notice in prepare.run("chat").notices if "end token" in notice.message]
    assert [notice.level for notice in warnings] == ["warning"]
    assert "no answer ends with an end token" in warnings[0].message
    assert "chat template" in warnings[0].remedy


def test_a_tokenizer_without_an_end_token_is_warned_of(prepare: Any, base_with: Any, rows_of_pairs: Any) -> None:
    prepare.base = base_with(None)
    (prepare.base / "tokenizer_config.json").write_text(json.dumps(NO_TOKENS))
    config = json.loads((prepare.base / "config.json").read_text())
    (prepare.base / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    prepare.jsonl("train.jsonl", rows_of_pairs(30))
    summary = prepare.run()
    (warning,) = [notice for notice in summary.notices if "no answer ends" in notice.message]
    assert "no end token is known" in warning.message
    assert "tokenizer_config.json" in warning.remedy
    assert summary.stop_token_ids == ()


def test_what_was_noticed_of_rows_is_counted_and_told_once(prepare: Any, rows_of_pairs: Any) -> None:
    rows = rows_of_pairs(30)
    for row in rows[:20]:
        row["prompt"] += " <|eos|>"
    prepare.jsonl("train.jsonl", rows)
    (notice,) = [notice for notice in prepare.run().notices if "spell" in notice.message]
    assert "20 rows spell control tokens ('<|eos|>')" in notice.message
    assert notice.level == "warning", "prompts of completions are often rendered chats"
    assert "special_tokens_in_text: allow" in notice.remedy
    assert len(notice.places) == 20
