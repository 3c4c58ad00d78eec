"""Generate answers with a bundle by plain transformers: one prompt with streamed tokens, or a file of rows in batches.

    predictor = open_predictor(bundle)                 # or open_predictor(bundle, untouched=True): the base it came from
    predictor.answer(questions, max_new_tokens=256)    # in batches, greedily
    predictor.stream(question, write, 256)             # `write` gets each piece of text

What a row is read as, and what its answer ends with, is what the bundle was trained for: its spec.json has the separator
and the columns, its generation_config the end tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from orchestrator.bases.own_code import require_consent
from orchestrator.data import load_tokenizer
from orchestrator.data.encoding.encoder import ended
from orchestrator.errors import BaseError, DataError, IntegrityError, UsageError
from orchestrator.serve.bundle import SPEC, BundleRecord
from orchestrator.serve.bundle_check import hub_copy, read_record, where_to_get
from orchestrator.serve.classifier import load_served
from orchestrator.spec.models import Task
from orchestrator.spec.tasks import TASKS
from orchestrator.store import read_json
from orchestrator.train.model.balance import without_router_logits

BATCH_ROWS = 16
Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Question:
    """Prompt or chat to answer, with its name for messages."""

    content: str | Messages
    place: str = ""
    """`file:line`, if it comes from a file."""
    separator: str | None = None
    """Replaces the bundle's own separator after a text."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON Schemas of the functions that a chat may call."""


@dataclass(frozen=True)
class Answer:
    """Greedy answer, or predicted class."""

    text: str
    """Answer without its end token; for a classifier the most likely class."""
    ended: bool = True
    """True if the model ended it; False if it was cut off at `max_new_tokens`."""
    probabilities: Mapping[str, float] | None = None
    """For a classifier: all classes, most likely first."""


@dataclass(frozen=True)
class Predictor:
    """Loaded model with its tokenizer and its task's prompt format."""

    model: Any
    tokenizer: Any
    task: Task
    separator: str
    name: str
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    longest: int
    """Maximum positions of the model, for question and answer together."""

    @property
    def classifies(self) -> bool:
        """True if an answer is a class instead of generated text."""
        return TASKS[self.task].head.supervises == "documents"

    @property
    def encodes(self) -> bool:
        """True for an encoder-decoder: the question is the encoder's input, and no part of the output."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def chats(self) -> bool:
        """True if a question is a conversation."""
        return TASKS[self.task].uses_chat_template

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """Answer one batch of questions, in their order.

        Raises:
            DataError: a question that the chat template refuses, or that leaves no room for an answer; names its place.
        """
        if self.classifies:
            return self._classified(questions)
        rows = [self.question_ids(question) for question in questions]
        room = max(0, self.longest - max(map(len, rows)))
        width = max(map(len, rows))
        output = self._generate(*self._padded(rows, width), min(max_new_tokens, room))
        return [self._answered(row[1 if self.encodes else width :].tolist()) for row in output]

    def _padded(self, rows: Sequence[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ids, mask) of rows, padded on the left: generation continues from the last position of every row. Those of an
        encoder-decoder are padded on the right, as in training."""
        missing = [width - len(row) for row in rows]
        if self.encodes:
            ids = [row + [self._pad_id()] * gap for row, gap in zip(rows, missing, strict=True)]
            mask = [[1] * len(row) + [0] * gap for row, gap in zip(rows, missing, strict=True)]
        else:
            ids = [[self._pad_id()] * gap + row for row, gap in zip(rows, missing, strict=True)]
            mask = [[0] * gap + [1] * len(row) for row, gap in zip(rows, missing, strict=True)]
        return torch.tensor(ids), torch.tensor(mask)

    def stream(self, question: Question, write: Callable[[str], None], max_new_tokens: int) -> Answer:
        """Answer one question and pass its text to `write` piece by piece.

        Raises:
            DataError: as `answer` says.
        """
        if self.classifies:
            return self._classified([question])[0]
        row = self.question_ids(question)
        ids = torch.tensor([row])
        streamer = _Pieces(self.tokenizer, write)
        output = self._generate(ids, torch.ones_like(ids), min(max_new_tokens, self.longest - len(row)), streamer)
        return self._answered(output[0][1 if self.encodes else len(row) :].tolist())

    def question_ids(self, question: Question) -> list[int]:
        """Return the question's tokens as training had them before an answer.

        Raises:
            DataError: as `answer` says.
        """
        if isinstance(question.content, str):
            between = self.separator if question.separator is None else question.separator
            text = f"{question.content}{between}"
            ids = self._encoder_ids(text) if self.encodes else [*self._begin_ids(), *self._plain_ids(text)]
        else:
            ids = self._chat_ids(question)
        if not ids:
            raise DataError("the question is empty, and the tokenizer has no begin token", where=question.place)
        if len(ids) >= self.longest:
            raise DataError(
                f"{len(ids)} tokens, and the model has {self.longest} positions for question and answer together",
                where=question.place,
                remedy="shorten it",
            )
        return ids

    def _chat_ids(self, question: Question) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(
                list(question.content), tools=list(question.tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja's own, and whatever a template raises
            raise DataError(f"the chat template rejects it: {error}", where=question.place, remedy="fix the messages") from None
        return self._plain_ids(text)

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encoder_ids(self, text: str) -> list[int]:
        """Return an encoder-decoder's prompt with the special tokens of a text, and an end token."""
        eos = self.tokenizer.eos_token_id
        return ended(self.tokenizer(text)["input_ids"], [eos] if eos is not None else [])

    def _begin_ids(self) -> list[int]:
        """Return the begin token, if the tokenizer adds one."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []

    def _pad_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *sorted(self.end_ids), 0)
        return next(token for token in known if token is not None)

    @torch.inference_mode()
    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, streamer: Any = None) -> torch.Tensor:
        device = self.model.device
        with without_router_logits(self.model):
            return self._generated(ids.to(device), mask.to(device), max_new_tokens, streamer)

    def _generated(self, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, streamer: Any) -> torch.Tensor:
        return self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(1, max_new_tokens),
            do_sample=False,
            num_beams=1,
            # Sampling settings of the base's generation_config would only cause warnings with greedy decoding.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._pad_id(),
            # Sorted, since a set has no fixed order.
            eos_token_id=sorted(self.end_ids) or None,
            streamer=streamer,
        )

    def _answered(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(text, ended=end is not None)

    @torch.inference_mode()
    def _classified(self, questions: Sequence[Question]) -> list[Answer]:
        texts = [str(question.content) for question in questions]
        encoded = [self.tokenizer(text)["input_ids"] for text in texts]
        for question, ids in zip(questions, encoded, strict=True):
            if not 0 < len(ids) <= self.longest:
                raise DataError(f"{len(ids)} tokens, and the model has {self.longest} positions", where=question.place)
        found = self.tokenizer.pad({"input_ids": encoded}, padding=True, return_tensors="pt").to(self.model.device)
        logits = self.model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
        shares = torch.softmax(logits.float(), dim=-1).cpu().tolist()
        names = self.model.config.id2label
        return [_class_answer({str(names[index]): share for index, share in enumerate(row)}) for row in shares]


def _class_answer(shares: Mapping[str, float]) -> Answer:
    ordered = dict(sorted(shares.items(), key=lambda entry: -entry[1]))
    return Answer(next(iter(ordered)), probabilities=ordered)


class _Pieces(TextStreamer):
    """Emits complete characters: text is held back while it may still change."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


def open_predictor(bundle: Path, *, untouched: bool = False, base: Path | None = None) -> Predictor:
    """Check a bundle's files against its manifest and load it.

    Args:
        bundle: A finished bundle.
        untouched: Load the base that it was made from instead, to be asked the same questions.
        base: The base's folder, where it is no longer where the manifest says.

    Raises:
        UsageError: not a bundle; or one with code that the user does not let run; or the base of a classifier, which knows no
            classes; or no base where it should be.
        VerificationError: a file of the bundle is not what its manifest says.
        BaseError: transformers cannot load it.
    """
    record = read_record(bundle)
    task = record.base.load.task
    require_consent(bundle, record.base.load.code_sha256)
    folder = bundle
    if untouched:
        if record.base.load.traits.head.is_new:
            raise UsageError("the base of a classifier has no classes", where=str(bundle), remedy="remove --base")
        folder = base or hub_copy(record.base) or Path(os.path.normpath(bundle.resolve() / record.base.path))
        if not (folder / "config.json").exists():
            raise UsageError("the base cannot be found", where=str(folder), remedy=where_to_get(record.base, "--base-folder"))
    model = _load(folder, record)
    spec = read_spec(bundle)
    separator = str(spec.get("data", {}).get("separator", "\\n")) if TASKS[task].uses_separator else ""
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None and TASKS[task].head.supervises == "documents":
        tokenizer.pad_token_id = model.config.pad_token_id
    # Classification reads the last token before the padding; `answer` pads generated rows itself.
    tokenizer.padding_side = "right"
    # Models without a limit on positions, such as those with ALiBi.
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    name = f"{record.base.name} (base model)" if untouched else record.name
    return Predictor(model, tokenizer, task, separator, name, _end_ids(model, tokenizer), int(positions))


def read_spec(bundle: Path) -> dict[str, Any]:
    """Read the spec that the bundle was made from; `task` and `data` are among its keys.

    Raises:
        UsageError: there is none.
        IntegrityError: it is damaged.
    """
    file = bundle / SPEC
    if not file.is_file():
        raise UsageError(f"not a bundle: there is no {SPEC}", where=str(bundle), expected="a bundle/ folder of a run")
    values = read_json(file)
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict) or "task" not in values:
        raise IntegrityError("no spec: task or data is missing", where=str(file), remedy="check it with `orchestrator verify`")
    return values


def _load(folder: Path, record: BundleRecord) -> Any:
    where: Any = "auto" if torch.cuda.is_available() else {"": "cpu"}
    dtype = getattr(torch, record.held_dtype)
    try:
        model = load_served(folder, record.base.load, dtype=dtype, device_map=where)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise BaseError(
            f"transformers cannot load it: {first}", where=str(folder), remedy="check it with `orchestrator verify`"
        ) from error
    return model.eval()


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: from generation_config.json, else the tokenizer's end token."""
    said = getattr(model.generation_config, "eos_token_id", None) if hasattr(model, "generation_config") else None
    said = said if isinstance(said, list | tuple) else [said] if said is not None else []
    return frozenset(said or ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []))


def answer_all(
    predictor: Predictor, questions: Sequence[Question], max_new_tokens: int, *, rows: int = BATCH_ROWS
) -> Iterator[tuple[int, Answer]]:
    """Yield (number of the question, its answer), in batches of questions of similar length.

    Raises:
        DataError: a question cannot be put; raised before the first answer, and names the first of them.
    """
    if predictor.classifies:
        lengths = [len(str(question.content)) for question in questions]
    else:
        # Tokenizing all questions first also finds those that cannot be asked before anything is answered.
        lengths = [len(predictor.question_ids(question)) for question in questions]
    # Similar lengths share a batch, so little is padded.
    order = sorted(range(len(questions)), key=lambda number: (lengths[number], number))
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        yield from zip(batch, predictor.answer([questions[number] for number in batch], max_new_tokens), strict=True)


def with_turn(messages: Messages, role: str, content: str) -> Messages:
    """Return a chat with one more turn."""
    return (*messages, {"role": role, "content": content})


def first_turn(text: str) -> Messages:
    """Return a chat that begins with a user's text."""
    return with_turn((), "user", text)


__all__ = [
    "Answer",
    "Messages",
    "Predictor",
    "Question",
    "answer_all",
    "first_turn",
    "open_predictor",
    "read_spec",
    "with_turn",
]
