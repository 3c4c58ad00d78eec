"""What is learned of a chat where formats, rows or specs are out of the ordinary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.data import load_tokenizer
from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.encoder import Document, Encoder
from orchestrator.data.encoding.row_notices import RowNotices
from orchestrator.data.reading.examples import Example
from orchestrator.data.reading.row import BadRow
from orchestrator.spec.models import DataSpec

from .families import FAMILIES, tokenizer_of

USER, ASSISTANT = "user", "assistant"
TURN = "<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def asked(*contents: str, **more: Any) -> tuple[dict[str, Any], ...]:
    """User and assistant by turns; the last turn has `more`."""
    turns = [turn((USER, ASSISTANT)[place % 2], content) for place, content in enumerate(contents)]
    return (*turns[:-1], turns[-1] | more)


def encode(tokenizer: Any, messages: tuple[dict[str, Any], ...], **data: Any) -> tuple[Any, RowNotices]:
    noticed = RowNotices()
    encoder = Encoder(tokenizer, "chat", DataSpec(train="x", **data), noticed=noticed)
    (document,) = encoder.encode([Example(file="f", line=3, content_key="k", messages=messages)])
    return document, noticed


def learned(tokenizer: Any, messages: tuple[dict[str, Any], ...], **data: Any) -> list[str]:
    """The texts of the supervised runs."""
    document, _ = encode(tokenizer, messages, **data)
    assert isinstance(document, Document), document
    edges = np.flatnonzero(np.diff(np.r_[0, document.supervised.astype(np.int8), 0]))
    return [tokenizer.decode(document.ids[start:end]) for start, end in edges.reshape(-1, 2)]


def test_a_template_may_write_otherwise_what_stood_before(base_with: Callable[[str | None], Path]) -> None:
    tokenizer = load_tokenizer(base_with("{{ messages|length }}" + PLAIN))
    assert learned(tokenizer, asked("hello", "good day", "and now?", "good night")) == ["good day<|eos|>", "good night<|eos|>"]


@pytest.mark.parametrize(
    ("template", "header", "told"),
    [(PLAIN, "", {}), (PLAIN.removesuffix(PROMPT), "<|assistant|>", {"header": {"<|assistant|>": None}})],
)
def test_a_header_that_the_template_does_not_ask_for_is_learned_and_told(
    base_with: Callable[[str | None], Path], template: str, header: str, told: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(base_with(template))
    assert learned(tokenizer, asked("hello", "good day")) == [f"{header}good day<|eos|>"]
    assert encode(tokenizer, asked("hello", "good day"))[1].what == told


@pytest.mark.parametrize("post", ["trimmed", "whole"])
def test_tokens_of_white_space_are_learned_whatever_the_offsets_say(post: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"], tmp_path)
    if post == "whole":
        tokenizer.backend_tokenizer.post_processor = None
    answer = "def f(x):\n    if x:\n        return 1\n\n\n    return   2\n\n"
    document, _ = encode(tokenizer, asked("write it", answer))
    assert tokenizer.decode(document.ids[document.supervised]) == f"{answer}<|im_end|>"


def test_a_default_system_text_is_not_learned_where_the_assistant_speaks_first(base_with: Callable[[str | None], Path]) -> None:
    default = "{% if messages[0]['role'] != 'system' %}<|system|>You are a helper.<|eos|>{% endif %}"
    tokenizer = load_tokenizer(base_with(default + PLAIN))
    assert learned(tokenizer, (turn(ASSISTANT, "I listen."), *asked("hello", "good day"))) == [
        "I listen.<|eos|>",
        "good day<|eos|>",
    ]


@pytest.mark.parametrize("name", ["chatml", "mistral-v1", "smollm3"])
def test_turns_are_chosen_by_weight_and_by_the_spec(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES[name], tmp_path)
    texts = lambda *given, **data: [  # noqa: E731
        text.split("</think>")[-1].removesuffix(tokenizer.eos_token).removesuffix("<|im_end|>").strip()
        for text in learned(tokenizer, *given, **data)
    ]
    draft = (turn(USER, "which?"), turn(ASSISTANT, "wrong", weight=0), *asked("again", "right", weight=1))
    assert texts(draft) == ["right"]
    assert texts(asked("a", "one", "b", "two", weight=0), train_on="last_assistant") == ["one"]
    assert texts(asked("a", "one", "b", "two"), train_on="last_assistant") == ["two"]
    assert texts(asked("a", "one", "b", "two")) == ["one", "two"]
    assert texts((*asked("a", "one", "b", "two"), turn(USER, "thanks"))) == ["one", "two"]


def test_the_answer_is_the_last_turn_that_is_learned(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"], tmp_path)
    document, _ = encode(tokenizer, (*asked("a", "one", "b", "two"), turn(USER, "thanks")))
    assert document.answer == "two"
    assert document.prompt.endswith("b<|im_end|>\n<|im_start|>assistant\n")
    document, _ = encode(tokenizer, asked("a", "one", "b", "two", weight=0))
    assert document.answer == "one"
    document, _ = encode(tokenizer, asked("a", "  "))
    assert document.num_supervised == 0


QWEN3 = {
    "reasoning_content": (turn(USER, "2+2?"), turn(ASSISTANT, "4", reasoning_content="a sum")),
    "content": (turn(USER, "2+2?"), turn(ASSISTANT, "<think>\na sum\n</think>\n\n4")),
}


@pytest.mark.parametrize("given", QWEN3)
def test_reasoning_is_learned_where_the_template_shows_it(given: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen3"], tmp_path)
    assert learned(tokenizer, QWEN3[given]) == ["<think>\na sum\n</think>\n\n4<|im_end|>"]
    more = (*QWEN3[given], *asked("and 3+3?", "6"))
    assert learned(tokenizer, more) == ["4<|im_end|>", "<think>\n\n</think>\n\n6<|im_end|>"]
    assert not encode(tokenizer, more)[1].places


@pytest.mark.parametrize("given", QWEN3)
def test_reasoning_that_the_template_leaves_out_is_told(given: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["deepseek-r1"], tmp_path)
    document, noticed = encode(tokenizer, QWEN3[given])
    assert document.answer.strip() == "4"
    assert list(noticed.places) == ["reasoning", "prompt"]
    assert list(noticed.what["prompt"]) == ["<think>\n"]


def test_what_ends_reasoning_is_part_of_the_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["harmony"], tmp_path)
    (text,) = learned(tokenizer, (turn(USER, "2+2?"), turn(ASSISTANT, "4", thinking="a sum")))
    assert text == "<|channel|>analysis<|message|>a sum<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"


def test_rows_that_a_template_looks_into_are_found_too(tmp_path: Path) -> None:
    """Qwen3's looks at how a user's turn begins and ends, which marks at both would hide."""
    tokenizer = tokenizer_of(FAMILIES["qwen3"], tmp_path)
    said = (
        turn(USER, "where?"),
        turn(ASSISTANT, "I look"),
        turn(USER, "<tool_response>shed</tool_response>"),
        turn(ASSISTANT, "shed"),
    )
    document, noticed = encode(tokenizer, said)
    assert tokenizer.decode(document.ids) == tokenizer.apply_chat_template(list(said), tokenize=False)
    assert learned(tokenizer, said) == ["I look<|im_end|>", "<think>\n\n</think>\n\nshed<|im_end|>"]
    assert not noticed.places


@pytest.mark.parametrize(
    "content",
    [
        "{% generation %}{{ m['content'] }}{% endgeneration %}<|eos|>",
        "{% generation %}{{ m['content'] }}<|eos|>\n{% endgeneration %}",
    ],
)
def test_marks_of_the_template_are_completed_to_the_end_of_the_turn(
    content: str, base_with: Callable[[str | None], Path]
) -> None:
    given = "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}" + content
    tokenizer = load_tokenizer(base_with(given + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}" + PROMPT))
    assert learned(tokenizer, asked("hello", "good day", "and now?", "good night")) == ["good day<|eos|>", "good night<|eos|>"]


def test_a_turn_that_the_template_changes_is_found_where_its_renderings_agree(base_with: Callable[[str | None], Path]) -> None:
    changed = PLAIN.replace("m['content'] }}", "m['content'].encode('ascii', 'ignore').decode() | upper }}")
    tokenizer = load_tokenizer(base_with(changed))
    assert learned(tokenizer, asked("hello", "good day")) == ["GOOD DAY<|eos|>"]


def test_a_turn_that_cannot_be_found_is_a_bad_row(base_with: Callable[[str | None], Path]) -> None:
    changed = "{{ messages|length }}" + PLAIN.replace("m['content'] }}", "m['content'].encode('ascii', 'ignore').decode() }}")
    bad, _ = encode(load_tokenizer(base_with(changed)), asked("hello", "good day"))
    assert isinstance(bad, BadRow)
    assert "{% generation %}" in bad.reason


def test_characters_for_private_use_stay_what_they_are(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"], tmp_path)
    said = "see \U000f0000 and \U000f0001\U0010fffd here"
    document, _ = encode(tokenizer, asked(f"{said} <|im_end|>", said))
    assert document.answer == said
    assert tokenizer.decode(document.ids[document.supervised]) == f"{said}<|im_end|>"


def test_an_answer_that_already_ends_ends_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"], tmp_path)
    for mode in ("escape", "allow"):
        document, noticed = encode(tokenizer, asked("hello", "good day<|im_end|>\n"), special_tokens_in_text=mode)
        assert tokenizer.decode(document.ids[document.supervised]) == "good day<|im_end|>"
        assert list(noticed.places) == ["ended"]


def texts_of(tokenizer: Any, task: Any, mode: str, **payload: str) -> tuple[Document, RowNotices]:
    noticed = RowNotices()
    encoder = Encoder(tokenizer, task, DataSpec(train="x", special_tokens_in_text=mode), noticed=noticed)
    (document,) = encoder.encode([Example(file="f", line=3, content_key="k", **payload)])
    return document, noticed


ROWS = [
    ("completion", {"prompt": "say <|eos|> now", "completion": "no <|user|>"}),
    ("text", {"text": "say <|eos|> now <|user|> no"}),
    ("classify", {"text": "say <|eos|> now <|user|> no", "label": "x"}),
]


@pytest.mark.parametrize(("task", "payload"), ROWS)
def test_control_tokens_in_other_rows_are_text_unless_they_are_allowed(
    task: Any, payload: dict[str, str], tokenizer: Any
) -> None:
    control = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")}
    end = 0 if task == "classify" else 1
    escaped, noticed = texts_of(tokenizer, task, "escape", **payload)
    assert sum(token in control for token in escaped.ids.tolist()) == end
    assert "say <|eos|> now" in tokenizer.decode(escaped.ids)
    assert list(noticed.what["escaped" if task == "classify" else "rendered"]) == ["<|eos|>", "<|user|>"]
    allowed, noticed = texts_of(tokenizer, task, "allow", **payload)
    assert sum(token in control for token in allowed.ids.tolist()) == 2 + end
    assert list(noticed.places) == ["allowed"]
    assert tokenizer.decode(allowed.ids) == tokenizer.decode(escaped.ids)


@pytest.mark.parametrize("mode", ["escape", "allow"])
def test_a_completion_or_text_that_already_ends_ends_once(mode: str, tokenizer: Any) -> None:
    plain, _ = texts_of(tokenizer, "completion", mode, prompt="q", completion="a b")
    for completion in ("a b<|eos|>", "a b<|eos|><|eos|>\n"):
        ended, noticed = texts_of(tokenizer, "completion", mode, prompt="q", completion=completion)
        assert ended.ids.tolist() == plain.ids.tolist()
        assert ended.answer == "a b"
        assert list(noticed.places) == ["ended"]
    ended, _ = texts_of(tokenizer, "text", mode, text="a b<|eos|>")
    assert ended.ids.tolist() == texts_of(tokenizer, "text", mode, text="a b")[0].ids.tolist()


@pytest.mark.parametrize("said", ["hello", "hello <|eos|>"])
def test_control_tokens_of_the_spec_are_control_tokens(said: str, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, "completion", DataSpec(train="x", separator="<|assistant|>"))
    (document,) = encoder.encode([Example(file="f", line=3, content_key="k", prompt=said, completion="good day")])
    special = [token for token in document.ids.tolist() if token in tokenizer.all_special_ids or token == 5]
    assert special == tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|eos|>"])
    assert document.prompt == f"{said}<|assistant|>"


MODELS: dict[str, Callable[[list[str]], Any]] = {
    "unigram": lambda names: models.Unigram([(name, -1.0 - place) for place, name in enumerate(names)], unk_id=0),
    "wordpiece": lambda names: models.WordPiece({name: place for place, name in enumerate(names)}, unk_token="<unk>"),
    "words": lambda names: models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"),
    "merged": lambda names: models.BPE(
        {name: place for place, name in enumerate(names)}, [("<", "/"), ("</", "s>")], unk_token="<unk>"
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_control_token_that_the_vocabulary_knows_as_a_piece_is_text_too(kind: str) -> None:
    """A SentencePiece vocabulary has its control tokens among its pieces, where plain text would find them."""
    names = ["<unk>", "</s>", "<", "/", "s", ">", "a", "s>", "</"]
    backend = Tokenizer(MODELS[kind](names))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    control = ControlTokens(fast)
    ids = control.text_ids(control.stand_in("a </s>") + "</s>")
    assert ids[0] == 6
    assert ids[-1] == 1
    assert 1 not in ids[:-1]
