"""What each task supervises, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.encoding.encoder import Document, Encoder, bare_ids, load_tokenizer, mark_supervised
from orchestrator.data.reading.examples import Example
from orchestrator.data.reading.row import BadRow
from orchestrator.errors import BaseError
from orchestrator.spec.models import DataSpec, Task

TURN = "<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>"
UNMARKED = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + UNMARKED
CHAT = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "good night"},
)


def example(**payload: Any) -> Example:
    return Example(file="f", line=3, content_key="k", **payload)


def encode(tokenizer: Any, task: Task, *examples: Example, **data: Any) -> list[Document]:
    documents = list(Encoder(tokenizer, task, DataSpec(train="x", **data)).encode(examples))
    assert all(isinstance(document, Document) for document in documents)
    return documents  # type: ignore[return-value]


def texts(tokenizer: Any, document: Document) -> tuple[str, str]:
    """(everything, what is supervised)."""
    return tokenizer.decode(document.ids), tokenizer.decode(document.ids[document.supervised])


class WithBegin:
    """A tokenizer that puts a begin token before a text by itself, as Llama's does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        encoded = self._tokenizer(text, add_special_tokens=False, **options)
        if add_special_tokens:
            ids, bos = encoded["input_ids"], [self._tokenizer.bos_token_id]
            encoded["input_ids"] = bos + ids if isinstance(text, str) else [bos + row for row in ids]
        return encoded


@pytest.fixture(params=["plain", "begin"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return tokenizer if request.param == "plain" else WithBegin(tokenizer)


def begin(tokenizer: Any) -> list[int]:
    return [tokenizer.bos_token_id] if isinstance(tokenizer, WithBegin) else []


def test_bare_ids_are_those_of_the_tokenizers_own_call(tokenizer: Any) -> None:
    said = ["", " ", "hello  there\n", "na\u00efve \u212b \U0001f600", "<|eos|> <|user|>hello", "1234 " * 50]
    expected = tokenizer(said, add_special_tokens=False)["input_ids"]
    tokenizer(said, truncation=True, max_length=2, padding=True)  # leaves both set in the backend
    assert bare_ids(tokenizer, said) == expected
    tokenizer.split_special_tokens = True
    try:
        assert bare_ids(tokenizer, said) == tokenizer(said, add_special_tokens=False)["input_ids"] != expected
    finally:
        tokenizer.split_special_tokens = False
        tokenizer("a")


def test_completion_supervises_the_answer_and_the_end(any_tokenizer: Any) -> None:
    (document,) = encode(any_tokenizer, "completion", example(prompt="2 + 2", completion="is 4"), separator=" =")
    raw = lambda text: any_tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    expected = [*begin(any_tokenizer), *raw("2 + 2 ="), *raw("is 4"), any_tokenizer.eos_token_id]
    assert document.ids.tolist() == expected
    assert document.supervised.sum() == len(raw("is 4")) + 1
    assert document.supervised[-document.supervised.sum() :].all()
    assert (document.prompt, document.answer) == ("2 + 2 =", "is 4")
    assert mark_supervised(document, any_tokenizer).endswith("2 + 2 =«is 4<|eos|>»")


def test_an_empty_answer_supervises_nothing_and_a_promptless_one_not_its_first_token(tokenizer: Any) -> None:
    empty, bare = encode(
        tokenizer, "completion", example(prompt="a", completion=""), example(prompt="", completion="word for word"), separator=""
    )
    assert empty.num_supervised == 0
    assert bare.supervised.tolist() == [False] + [True] * (len(bare.ids) - 1)


def test_text_predicts_every_token_but_the_first_once_over_all_chunks(any_tokenizer: Any) -> None:
    long = " ".join(f"word{number}" for number in range(40))
    for max_tokens in (8, 9, 13, 500):
        documents = encode(any_tokenizer, "text", example(text=long), max_tokens=max_tokens)
        whole = [*begin(any_tokenizer), *any_tokenizer(long, add_special_tokens=False)["input_ids"], any_tokenizer.eos_token_id]
        assert np.concatenate([document.ids[1:] for document in documents]).tolist() == whole[1:]
        for number, document in enumerate(documents):
            assert 2 <= len(document.ids) <= max_tokens
            assert document.supervised.tolist() == [False] + [True] * (len(document.ids) - 1)
            before = begin(any_tokenizer) or [int(documents[number - 1].ids[-1]) if number else whole[0]]
            assert document.ids[0] == before[0]


def test_classify_keeps_the_tokenizers_own_special_tokens(any_tokenizer: Any) -> None:
    (document,) = encode(any_tokenizer, "classify", example(text="hello", label="x"))
    assert document.ids.tolist() == any_tokenizer("hello")["input_ids"]
    assert not document.supervised.any()


def test_chat_supervises_the_turns_that_the_template_marks(tokenizer: Any) -> None:
    (document,) = encode(tokenizer, "chat", example(messages=CHAT))
    whole, supervised = texts(tokenizer, document)
    assert "hello there" in whole
    assert supervised == "good day<|eos|>good night<|eos|>"
    assert document.answer == "good night"
    assert document.prompt.endswith("and now?<|assistant|>\n")
    assert mark_supervised(document, tokenizer).count("«") == 2


def test_chat_without_marks_finds_the_turns_by_rendering(base_with: Callable[[str | None], Path]) -> None:
    tokenizer = load_tokenizer(base_with(UNMARKED))
    document, first = encode(tokenizer, "chat", example(messages=CHAT), example(messages=CHAT[2:3]))
    whole, supervised = texts(tokenizer, document)
    assert whole == tokenizer.apply_chat_template(list(CHAT), tokenize=False)
    assert supervised == "good day<|eos|>good night<|eos|>"
    assert texts(tokenizer, first)[1].endswith("good day<|eos|>")


def test_chat_that_ends_with_the_user_learns_the_turns_before(tokenizer: Any) -> None:
    (document,) = encode(tokenizer, "chat", example(messages=CHAT[:4]))
    assert texts(tokenizer, document)[1] == "good day<|eos|>"
    assert document.answer == "good day"
    (silent,) = encode(tokenizer, "chat", example(messages=CHAT[:2]))
    assert silent.num_supervised == 0


def test_a_row_that_the_template_refuses_is_a_bad_row(base_with: Callable[[str | None], Path]) -> None:
    tokenizer = load_tokenizer(base_with(STRICT))
    encoder = Encoder(tokenizer, "chat", DataSpec(train="x"))
    bad, good = encoder.encode([example(messages=CHAT), example(messages=CHAT[1:3])])
    assert isinstance(bad, BadRow)
    assert str(bad) == "f:3: the chat template rejects it: the user speaks first"
    assert isinstance(good, Document)


def test_a_base_without_template_or_tokenizer_is_refused(base_with: Callable[[str | None], Path], tmp_path: Path) -> None:
    folder = base_with(None)
    with pytest.raises(BaseError, match="no chat template"):
        Encoder(load_tokenizer(folder), "chat", DataSpec(train="x"))
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:5000])
    with pytest.raises(BaseError, match="no tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BaseError, match=r"tokenizer\.json"):
        load_tokenizer(folder)
    with pytest.raises(BaseError, match="no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("max_tokens", [10, 14, 17])
def test_truncation_cuts_the_prompt_after_the_begin_token(any_tokenizer: Any, max_tokens: int) -> None:
    row = example(prompt=" ".join(f"word {n}" for n in range(9)), completion="yes")
    (document,) = encode(any_tokenizer, "completion", row)
    assert len(document.ids) > 17
    data = DataSpec(train="x", max_tokens=max_tokens, long_rows="truncate_prompt")
    fitted = Encoder(any_tokenizer, "completion", data).fit(document)
    assert fitted is not None
    assert len(fitted.ids) == max_tokens
    head = len(begin(any_tokenizer))
    assert fitted.ids[:head].tolist() == begin(any_tokenizer)
    assert fitted.ids[head:].tolist() == document.ids[head - max_tokens :].tolist()
    assert fitted.num_supervised == document.num_supervised
    assert Encoder(any_tokenizer, "completion", DataSpec(train="x", max_tokens=max_tokens)).fit(document) is None


def test_an_answer_is_never_cut(any_tokenizer: Any) -> None:
    row = example(prompt="q", completion="one two three four five six seven")
    (document,) = encode(any_tokenizer, "completion", row)
    for max_tokens in range(8, len(document.ids)):
        data = DataSpec(train="x", max_tokens=max_tokens, long_rows="truncate_prompt")
        fitted = Encoder(any_tokenizer, "completion", data).fit(document)
        if fitted is not None:
            assert fitted.num_supervised == document.num_supervised
            assert len(fitted.ids) > len(begin(any_tokenizer)) + fitted.num_supervised
        else:
            assert max_tokens <= document.num_supervised + len(begin(any_tokenizer))


class WithBothEnds(WithBegin):
    """A tokenizer that puts one token before a text and another after it, as BERT's does."""

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        encoded = super().__call__(text, add_special_tokens, **options)
        if add_special_tokens:
            ids, eos = encoded["input_ids"], [self._tokenizer.eos_token_id]
            encoded["input_ids"] = ids + eos if isinstance(text, str) else [row + eos for row in ids]
        return encoded


@pytest.mark.parametrize("wrap", [lambda plain: plain, WithBegin, WithBothEnds])
def test_a_long_text_to_classify_keeps_its_beginning(tokenizer: Any, wrap: Callable[[Any], Any]) -> None:
    special = wrap(tokenizer)
    (document,) = encode(special, "classify", example(text=" ".join(f"word{number}" for number in range(20)), label="x"))
    data = DataSpec(train="x", max_tokens=10, long_rows="truncate_prompt")
    fitted = Encoder(special, "classify", data).fit(document)
    assert fitted is not None
    end = [tokenizer.eos_token_id] if wrap is WithBothEnds else []
    assert fitted.ids.tolist() == [*document.ids[: 10 - len(end)].tolist(), *end]
    assert len(fitted.supervised) == 10
    assert Encoder(special, "classify", DataSpec(train="x", max_tokens=10)).fit(document) is None
