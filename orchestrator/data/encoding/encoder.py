"""Encode examples as tokens and masks, by the supervision of each task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.encoding.chat import ChatEncoder, RenderedChat
from orchestrator.data.encoding.control_tokens import ControlTokens
from orchestrator.data.encoding.row_notices import RowNotices
from orchestrator.data.reading.examples import Example
from orchestrator.data.reading.row import BadRow
from orchestrator.errors import BaseError
from orchestrator.spec.models import DataSpec, Task
from orchestrator.spec.tasks import TASKS
from orchestrator.store import read_json

BATCH_ROWS = 256
"""Number of texts tokenized at once."""


@dataclass(frozen=True, slots=True)
class Document:
    """Tokenized document of L tokens."""

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
    """Load the base's fast tokenizer, from its folder only.

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
    # Silences the warning about long texts; lengths are checked against data.max_tokens and the model's positions.
    tokenizer.model_max_length = int(1e12)
    return tokenizer


def has_encoder(folder: Path) -> bool:
    """Return whether the base in a folder is an encoder-decoder, as its config.json says."""
    file = folder / "config.json"
    return file.is_file() and bool(read_json(file).get("is_encoder_decoder"))


class Encoder:
    """Tokenizes examples of one task with one tokenizer.

    Args:
        ends: Ids at which the base stops as it is, beside the tokenizer's own end token.
        noticed: Gets what is worth telling of the rows.
        apart: Whether the base is an encoder-decoder: prompt and completion are then two inputs, each with the special tokens
            that the tokenizer gives a text, and with an end token.

    Raises:
        BaseError: `chat`, and the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        data: DataSpec,
        *,
        ends: Sequence[int] = (),
        noticed: RowNotices | None = None,
        apart: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._apart = apart
        self._bos = _bos_ids(tokenizer)
        self._eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._traits = TASKS[task]
        self._noticed = noticed if noticed is not None else RowNotices()
        if self._traits.uses_chat_template and not tokenizer.chat_template:
            raise BaseError(
                "the tokenizer has no chat template",
                expected="chat_template.jinja in the base's folder",
                remedy="add one, or set task: completion",
            )
        if self._traits.uses_chat_template:
            texts = [str(text) for text in tokenizer.convert_ids_to_tokens([*self._eos, *ends]) if text]
            self._chat = ChatEncoder(tokenizer, data, texts, self._noticed)
        else:
            self._control = ControlTokens(tokenizer)
        encoders: dict[Task, Callable[[Sequence[Example]], Iterable[Document | BadRow]]] = {
            "completion": self._completions,
            "chat": self._chats,
            "text": self._texts,
            "classify": self._classified,
        }
        self._encode = encoders[task]

    def encode(self, examples: Sequence[Example]) -> Iterator[Document | BadRow]:
        """Yield the documents of the examples, in order; task `text` gives one per chunk. A row that the chat template rejects
        is a BadRow."""
        for start in range(0, len(examples), BATCH_ROWS):
            yield from self._encode(examples[start : start + BATCH_ROWS])

    def fit(self, document: Document) -> Document | None:
        """Return the document within `max_tokens`, or None if it has to be dropped.

        `truncate_prompt` cuts the prompt's beginning, after the begin token, and never the answer; where nothing of the
        prompt would be left the document is dropped. Of a text to classify it cuts the end, before the special tokens
        that the tokenizer puts there.
        """
        excess = len(document.ids) - self._data.max_tokens
        if excess <= 0:
            return document
        if self._traits.head.supervises == "documents":
            return self._beginning(document)
        # The begin token stays, as the model expects it first.
        kept = len(self._bos) if document.ids[: len(self._bos)].tolist() == self._bos else 0
        prompt_end = int(np.argmax(document.supervised)) if document.supervised.any() else 0
        if self._data.long_rows != "truncate_prompt" or kept + excess >= prompt_end:
            return None
        cut = np.r_[0:kept, kept + excess : len(document.ids)]
        return replace(document, ids=document.ids[cut], supervised=document.supervised[cut])

    @property
    def cut_part(self) -> str:
        """Name of the part that `truncate_prompt` removes."""
        return "text's end" if self._traits.head.supervises == "documents" else "prompt's beginning"

    def _beginning(self, document: Document) -> Document | None:
        end = _num_end_tokens(self._tokenizer)
        room = self._data.max_tokens - end
        if self._data.long_rows != "truncate_prompt" or room <= len(self._bos):
            return None
        cut = np.r_[0:room, len(document.ids) - end : len(document.ids)]
        return replace(document, ids=document.ids[cut], supervised=document.supervised[cut])

    def _ids(
        self, texts: Sequence[str], examples: Sequence[Example], *, suffixes: Sequence[str] = (), special: bool = False
    ) -> list[list[int]]:
        """Return the token ids of the examples' texts; control tokens in them are text unless the spec allows them.

        Args:
            suffixes: What follows each text; control tokens in it are what the spec means.
            special: Whether the tokenizer puts its own special tokens around.
        """
        suffixes = suffixes or [""] * len(texts)
        whole = [f"{text}{suffix}" for text, suffix in zip(texts, suffixes, strict=True)]
        ids = self._tokenizer(whole)["input_ids"] if special else bare_ids(self._tokenizer, whole)
        # One search over the batch is far cheaper than one per text, and rows with control tokens are rare.
        if not self._control.pattern.search("\n".join(texts)):
            return ids
        for index, (text, suffix, example) in enumerate(zip(texts, suffixes, examples, strict=True)):
            if held := self._control.held_by(text):
                kind = "rendered" if self._traits.head.supervises == "tokens" else "escaped"
                if self._data.special_tokens_in_text == "allow":
                    self._noticed.add("allowed", example.place, *held)
                    continue
                self._noticed.add(kind, example.place, *held)
                ids[index] = self._control.text_ids(self._control.stand_in(text) + suffix, special=special)
        return ids

    def _without_begin(self, text: str, example: Example) -> str:
        """Return a text without the begin token that it already begins with, if the tokenizer adds one."""
        bos = self._tokenizer.bos_token
        if not self._bos or not text.startswith(bos):
            return text
        self._noticed.add("begun", example.place, bos)
        return text.removeprefix(bos)

    def _without_end(self, text: str, example: Example) -> str:
        """Return a text without the end tokens that it already ends with."""
        text, taken = self._control.without_ends(text, [self._tokenizer.eos_token] if self._eos else [])
        if taken:
            self._noticed.add("ended", example.place, *taken)
        return text

    def _completions(self, examples: Sequence[Example]) -> Iterator[Document]:
        """Encode with loss on the completion and the end token; prompt and completion are tokenized separately, as in serving."""
        separators = [self._data.separator if row.separator is None else row.separator for row in examples]
        prompts = [self._without_begin(str(example.prompt), example) for example in examples]
        answers = [self._without_end(str(example.completion), example) for example in examples]
        # `apart`, the special tokens of a text are around each.
        ids = (
            self._ids(prompts, examples, suffixes=separators, special=self._apart),
            self._ids(answers, examples, special=self._apart),
        )
        for example, prompt, separator, answer, head, tail in zip(examples, prompts, separators, answers, *ids, strict=True):
            # Prompt and answer are tokenized separately, as in serving: tokenized together, a token could span their border.
            if self._apart:
                before, after = ended(head, self._eos), ended(tail, self._eos) if answer else []
            else:
                before, after = [*self._bos, *head], [*tail, *self._eos] if answer else []
            mask = _answer_mask(len(before), len(after))
            yield Document(np.asarray(before + after, np.int32), mask, example, f"{prompt}{separator}", answer)

    def _texts(self, examples: Sequence[Example]) -> Iterator[Document]:
        """Encode texts in chunks of `max_tokens`, so that every token but a text's first is predicted once.

        Each chunk begins with the begin token; where the tokenizer has none, with the last token of the chunk before.
        """
        texts = [self._without_end(self._without_begin(str(example.text), example), example) for example in examples]
        for example, tokens in zip(examples, self._ids(texts, examples), strict=True):
            ids = [*self._bos, *tokens, *self._eos]
            room = self._data.max_tokens - 1
            # Each chunk predicts `room` tokens and repeats one token of context, so every token but the first is predicted once.
            for start in range(0, max(1, len(ids) - 1), room):
                first = self._bos or ids[start : start + 1]
                chunk = [*first, *ids[start + 1 : start + 1 + room]]
                yield _document(chunk, np.ones(len(chunk), bool), example)

    def _classified(self, examples: Sequence[Example]) -> Iterator[Document]:
        """Encode as in the base's pretraining, special tokens included; the class is the label."""
        encoded = self._ids([str(example.text) for example in examples], examples, special=True)
        for example, ids in zip(examples, encoded, strict=True):
            yield _document(ids, np.zeros(len(ids), bool), example)

    def _chats(self, examples: Sequence[Example]) -> Iterator[Document | BadRow]:
        """Encode with loss on the assistant's turns."""
        rendered = [self._chat.render(example) for example in examples]
        encoded = iter(self._chat.encode([chat for chat in rendered if isinstance(chat, RenderedChat)]))
        for chat in rendered:
            if isinstance(chat, BadRow):
                yield chat
            else:
                ids, supervised = next(encoded)
                yield _document(ids, np.asarray(supervised, bool), chat.example, *self._chat.prompt_and_answer(chat))


def mark_supervised(document: Document, tokenizer: Any) -> str:
    """Return the document's text with «» around supervised parts."""
    parts: list[str] = []
    edges = [0, *(np.flatnonzero(np.diff(document.supervised.astype(np.int8))) + 1).tolist(), len(document.ids)]
    for start, end in itertools.pairwise(edges):
        text = tokenizer.decode(document.ids[start:end].tolist())
        parts.append(f"«{text}»" if document.supervised[start] else text)
    return "".join(parts)


def ended(ids: list[int], eos: Sequence[int]) -> list[int]:
    """Return an encoder-decoder's text with an end token, where the tokenizer gives it none."""
    return ids if set(eos) & set(ids[-2:]) else [*ids, *eos]


@lru_cache(maxsize=4096)
def _answer_mask(num_before: int, num_after: int) -> np.ndarray:
    """Return bool[L], read-only and cached: among a million short rows, few pairs of lengths differ."""
    mask = np.zeros(num_before + num_after, bool)
    # Position 0 has no context to be predicted from, even if there is no prompt.
    mask[max(1, num_before) :] = True
    # Shared by all documents of these lengths.
    mask.flags.writeable = False
    return mask


def bare_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return what `tokenizer(texts, add_special_tokens=False)["input_ids"]` does, without the offsets and masks that take half
    of its time."""
    backend = tokenizer.backend_tokenizer
    # Settings of an earlier call stay on the shared backend.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _document(ids: list[int], mask: np.ndarray, example: Example, prompt: str = "", answer: str = "") -> Document:
    mask[:1] = False
    return Document(np.asarray(ids, np.int32), mask, example, prompt, answer)


def _bos_ids(tokenizer: Any) -> list[int]:
    """Return the begin token, if the tokenizer adds one before a text."""
    # Asked by example: add_bos_token and the post-processor disagree in some tokenizers.
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _num_end_tokens(tokenizer: Any) -> int:
    """Return the number of special tokens that the tokenizer adds after a text, as BERT's does."""
    last = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    return tokenizer("a")["input_ids"][::-1].index(last)
