"""From examples to tokens and masks: what each task supervises."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.reading import BadRow
from orchestrator.data.rows import Example
from orchestrator.errors import BaseError, DataError
from orchestrator.spec.models import DataSpec, Task

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
BATCH_ROWS = 256
"""So many texts are tokenised at once."""


@dataclass(frozen=True)
class Document:
    """One tokenised document of L tokens."""

    ids: np.ndarray
    """int32[L]"""
    supervised: np.ndarray
    """bool[L]; the first token is never supervised, since nothing predicts it."""
    example: Example
    prompt: str = ""
    answer: str = ""

    @property
    def num_supervised(self) -> int:
        return int(self.supervised.sum())


def load_tokenizer(folder: Path) -> Any:
    """The base's fast tokenizer, from its folder alone.

    Raises:
        BaseError: there is none, it is damaged, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    expected = "tokenizer.json and tokenizer_config.json"
    remedy = "copy the tokenizer's files into the base's folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise BaseError(f"no tokenizer: {first_line}", where=str(folder), expected=expected, remedy=remedy) from None
    if not tokenizer.is_fast:
        raise BaseError("the tokenizer is not a fast one", where=str(folder), expected=expected, remedy=remedy)
    tokenizer.model_max_length = int(1e12)
    return tokenizer


class Encoder:
    """Tokenises examples of one task with one tokenizer.

    Raises:
        BaseError: `chat`, and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, task: Task, data: DataSpec) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._bos = _bos_ids(tokenizer)
        self._eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._task = task
        if task == "chat" and not tokenizer.chat_template:
            raise BaseError(
                "the tokenizer has no chat template",
                expected="chat_template.jinja in the base's folder",
                remedy="add one, or set task: completion",
            )
        encoders: dict[Task, Callable[[Sequence[Example]], Iterable[Document | BadRow]]] = {
            "completion": self._completions,
            "chat": self._chats,
            "text": self._texts,
            "classify": self._classified,
        }
        self._encode = encoders[task]

    def encode(self, examples: Sequence[Example]) -> Iterator[Document | BadRow]:
        """Documents of the examples, in order; `text` gives one a chunk. A row that the chat template refuses is a BadRow."""
        for start in range(0, len(examples), BATCH_ROWS):
            yield from self._encode(examples[start : start + BATCH_ROWS])

    def fit(self, document: Document) -> Document | None:
        """The document within `max_tokens`, or None where it has to be dropped.

        `truncate_prompt` cuts the prompt's beginning, after the begin token, and never the answer; where nothing of the
        prompt would be left the document is dropped. Of a text to classify it cuts the end, before the special tokens
        that the tokenizer puts there.
        """
        excess = len(document.ids) - self._data.max_tokens
        if excess <= 0:
            return document
        if self._task == "classify":
            return self._beginning(document)
        kept = len(self._bos) if document.ids[: len(self._bos)].tolist() == self._bos else 0
        prompt_end = int(np.argmax(document.supervised)) if document.supervised.any() else 0
        if self._data.long_rows != "truncate_prompt" or kept + excess >= prompt_end:
            return None
        cut = np.r_[0:kept, kept + excess : len(document.ids)]
        return replace(document, ids=document.ids[cut], supervised=document.supervised[cut])

    @property
    def cut_part(self) -> str:
        """What `truncate_prompt` takes away."""
        return "text's end" if self._task == "classify" else "prompt's beginning"

    def _beginning(self, document: Document) -> Document | None:
        end = _num_end_tokens(self._tokenizer)
        room = self._data.max_tokens - end
        if self._data.long_rows != "truncate_prompt" or room <= len(self._bos):
            return None
        cut = np.r_[0:room, len(document.ids) - end : len(document.ids)]
        return replace(document, ids=document.ids[cut], supervised=document.supervised[cut])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _completions(self, examples: Sequence[Example]) -> Iterator[Document]:
        """Loss on the completion and the end token; prompt and completion are tokenised apart, as at serving."""
        between = self._data.separator
        prompts = [f"{row.prompt}{between if row.separator is None else row.separator}" for row in examples]
        answers = [str(example.completion) for example in examples]
        encoded = zip(examples, prompts, answers, self._ids(prompts), self._ids(answers), strict=True)
        for example, prompt, answer, head, tail in encoded:
            before, after = [*self._bos, *head], [*tail, *self._eos] if answer else []
            yield _document(before + after, [False] * len(before) + [True] * len(after), example, prompt, answer)

    def _texts(self, examples: Sequence[Example]) -> Iterator[Document]:
        """Every token but a text's first is predicted once, in chunks of `max_tokens`.

        Each chunk begins with the begin token; where the tokenizer has none, with the last token of the chunk before.
        """
        for example, tokens in zip(examples, self._ids([str(example.text) for example in examples]), strict=True):
            ids = [*self._bos, *tokens, *self._eos]
            room = self._data.max_tokens - 1
            for start in range(0, max(1, len(ids) - 1), room):
                first = self._bos or ids[start : start + 1]
                chunk = [*first, *ids[start + 1 : start + 1 + room]]
                yield _document(chunk, [True] * len(chunk), example)

    def _classified(self, examples: Sequence[Example]) -> Iterator[Document]:
        """Tokens as the base saw them in pretraining, special tokens included; the class is the label."""
        encoded = self._tokenizer([str(example.text) for example in examples])["input_ids"]
        for example, ids in zip(examples, encoded, strict=True):
            yield _document(ids, [False] * len(ids), example)

    def _chats(self, examples: Sequence[Example]) -> Iterator[Document | BadRow]:
        """Loss on the assistant's turns."""
        from jinja2 import TemplateError

        for example in examples:
            try:
                yield self._chat(example)
            except DataError:
                raise
            except (TemplateError, TypeError, ValueError) as error:
                yield BadRow(example.file, example.line, f"the chat template refuses it: {error}")

    def _chat(self, example: Example) -> Document:
        """By the template's generation marks; without them, by what each assistant turn adds to the rendered text."""
        messages = list(example.messages or ())
        if GENERATION_MARK.search(str(self._tokenizer.chat_template)):
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, supervised = rendered["input_ids"], [bool(value) for value in rendered["assistant_masks"]]
        else:
            ids, supervised = self._by_prefixes(messages, example)
        prompt, answer = "", ""
        if messages[-1]["role"] == "assistant":
            prompt, answer = self._render(messages[:-1], generation_prompt=True), messages[-1]["content"]
        return _document(ids, supervised, example, prompt, answer)

    def _by_prefixes(self, messages: list[dict[str, str]], example: Example) -> tuple[list[int], list[bool]]:
        """Tokens and mask: an assistant turn is what stands between the rendering that asks for it and the one that has it.

        Raises:
            DataError: one rendering does not begin with the one before it.
        """
        whole = self._render(messages)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], generation_prompt=True)
                after = self._render(messages[: index + 1])
                if not after.startswith(before) or not whole.startswith(after):
                    raise DataError(
                        "the chat template has no {% generation %} marks, and its turns are not prefixes of one another",
                        where=example.place,
                        remedy="put {% generation %} ... {% endgeneration %} around the assistant's content in the template",
                    )
                spans.append((len(before), len(after)))
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        places = encoded["offset_mapping"]
        return encoded["input_ids"], [any(a <= start < end <= b for a, b in spans) for start, end in places]

    def _render(self, messages: list[dict[str, str]], *, generation_prompt: bool = False) -> str:
        if not messages:
            return ""
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)


def mark_supervised(document: Document, tokenizer: Any) -> str:
    """The document's text with «» around what is supervised."""
    parts: list[str] = []
    edges = [0, *(np.flatnonzero(np.diff(document.supervised.astype(np.int8))) + 1).tolist(), len(document.ids)]
    for start, end in itertools.pairwise(edges):
        text = tokenizer.decode(document.ids[start:end].tolist())
        parts.append(f"«{text}»" if document.supervised[start] else text)
    return "".join(parts)


def _document(ids: list[int], supervised: list[bool], example: Example, prompt: str = "", answer: str = "") -> Document:
    mask = np.asarray(supervised, bool)
    mask[:1] = False
    return Document(np.asarray(ids, np.int32), mask, example, prompt, answer)


def _bos_ids(tokenizer: Any) -> list[int]:
    """The begin token, where the tokenizer puts one before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _num_end_tokens(tokenizer: Any) -> int:
    """Special tokens that the tokenizer puts after a text by itself, as BERT's does."""
    last = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    return tokenizer("a")["input_ids"][::-1].index(last)
