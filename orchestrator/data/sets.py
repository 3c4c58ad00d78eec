"""A tokenized set: flat arrays, one document after another."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from orchestrator.data.rng import SHUFFLED_ANSWERS, generator
from orchestrator.data.summary import DataSummary
from orchestrator.errors import DataError, IntegrityError
from orchestrator.store import read_record, write_atomic

DAMAGE = (ValueError, KeyError, OSError, EOFError, RuntimeError, MemoryError, SyntaxError, zipfile.BadZipFile, zlib.error)
"""Errors that numpy and zipfile raise for a damaged file."""
TRIES = 16
"""Number of partners drawn before all are tried."""


@dataclass(frozen=True, eq=False)
class TokenizedSet:
    """D documents with N tokens in total."""

    ids: np.ndarray
    """int32[N]: token ids."""
    supervised: np.ndarray
    """bool[N]: whether the loss counts the prediction of this token."""
    offsets: np.ndarray
    """int64[D + 1]: document d is ids[offsets[d]:offsets[d + 1]]."""
    labels: np.ndarray
    """int32[D]: class of each document; -1 where there are no classes."""
    rows: np.ndarray
    """int64[D]: line or row number that each document came from."""
    prompts: list[str] = field(default_factory=list)
    """D texts before the answer (completion, chat), else empty."""
    answers: list[str] = field(default_factory=list)
    """D expected answers (completion, chat), else empty."""
    stop_ids: tuple[int, ...] = ()
    """Token ids at which an answer ends (completion, chat), see `data.encoding.end_tokens`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64[D]: tokens of each document."""
        return np.diff(self.offsets)

    @cached_property
    def num_supervised(self) -> np.ndarray:
        """int64[D]: supervised tokens of each document."""
        # 32 bits halve the memory of the running sum, which is large for long sets.
        totals = np.zeros(self.num_tokens + 1, np.int32 if self.num_tokens < 2**31 else np.int64)
        np.cumsum(self.supervised, out=totals[1:])
        return (totals[self.offsets[1:]] - totals[self.offsets[:-1]]).astype(np.int64)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, supervised) of one document."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.ids[part], self.supervised[part]

    def select(self, documents: np.ndarray) -> TokenizedSet:
        """Return the set with these documents only, in this order."""
        parts = [self.document(int(index)) for index in documents]
        return TokenizedSet(
            ids=np.concatenate([ids for ids, _ in parts]) if parts else self.ids[:0],
            supervised=np.concatenate([mask for _, mask in parts]) if parts else self.supervised[:0],
            offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in parts])]).astype(np.int64),
            labels=self.labels[documents],
            rows=self.rows[documents],
            prompts=[self.prompts[int(index)] for index in documents] if self.prompts else [],
            answers=[self.answers[int(index)] for index in documents] if self.answers else [],
            stop_ids=self.stop_ids,
        )

    @cached_property
    def sha256(self) -> str:
        """Return the hash over tokens, masks, borders and classes: all that training sees."""
        digest = hashlib.sha256()
        for array in (self.ids, self.supervised, self.offsets, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @cached_property
    def tokens_sha256(self) -> str:
        """Return the hash over tokens and borders only: all that a frozen model sees."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        digest.update(np.ascontiguousarray(self.offsets).data)
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write an .npz file, atomically; texts are UTF-8 JSON, nothing is pickled."""
        buffer = io.BytesIO()
        values = {"prompts": self.prompts, "answers": self.answers, "stop_ids": self.stop_ids}
        texts = json.dumps(values, ensure_ascii=False).encode()
        np.savez_compressed(
            buffer,
            ids=self.ids,
            supervised=self.supervised,
            offsets=self.offsets,
            labels=self.labels,
            rows=self.rows,
            texts=np.frombuffer(texts, dtype=np.uint8),
        )
        write_atomic(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> TokenizedSet:
        """Read what `save` wrote.

        Raises:
            IntegrityError: the file is damaged.
            DataError: there is none.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as arrays:
                texts = json.loads(arrays["texts"].tobytes())
                return cls(
                    arrays["ids"],
                    arrays["supervised"],
                    arrays["offsets"],
                    # Named arrays with allow_pickle=False: loading a file of a run must not execute code.
                    arrays["labels"],
                    arrays["rows"],
                    texts["prompts"],
                    texts["answers"],
                    # Missing in sets of older versions.
                    tuple(texts.get("stop_ids", ())),
                )
        except FileNotFoundError:
            raise DataError("no tokenised set", where=str(path), remedy="submit the spec again: it is rebuilt") from None
        except DAMAGE as error:
            raise IntegrityError(f"damaged set: {error}", where=str(path), remedy="remove it; it is rebuilt") from error


def build_set(
    documents: list[tuple[np.ndarray, np.ndarray]],
    *,
    labels: list[int] | None = None,
    rows: list[int] | None = None,
    prompts: list[str] | None = None,
    answers: list[str] | None = None,
) -> TokenizedSet:
    """Build a set from (ids, supervised) of every document."""
    count = len(documents)
    lengths = [len(ids) for ids, _ in documents]
    return TokenizedSet(
        ids=np.concatenate([ids for ids, _ in documents]).astype(np.int32, copy=False) if documents else np.zeros(0, np.int32),
        supervised=np.concatenate([mask for _, mask in documents]).astype(bool, copy=False) if documents else np.zeros(0, bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.asarray(labels if labels is not None else [-1] * count, dtype=np.int32),
        rows=np.asarray(rows if rows is not None else range(count), dtype=np.int64),
        prompts=prompts or [],
        answers=answers or [],
    )


def joined(first: TokenizedSet, second: TokenizedSet) -> TokenizedSet:
    """Concatenate two sets. Texts are left out if only one of them has them."""
    both = bool(first.prompts) and bool(second.prompts)
    return TokenizedSet(
        ids=np.concatenate([first.ids, second.ids]),
        supervised=np.concatenate([first.supervised, second.supervised]),
        offsets=np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
        labels=np.concatenate([first.labels, second.labels]),
        rows=np.concatenate([first.rows, second.rows]),
        prompts=first.prompts + second.prompts if both else [],
        answers=first.answers + second.answers if both else [],
        stop_ids=first.stop_ids,
    )


def shuffled(data: TokenizedSet, seed: int) -> TokenizedSet:
    """Permute the answers among the prompts (for classification: classes among the texts), as a control for style.

    A document's answer begins at its first supervised token (in a chat: the first assistant turn and all that follows).
    Nothing is cut: a prompt only gets an answer with which it is no longer than the longest document of the set, and no
    document keeps its own answer where another one fits. The same answers are there as before, each once.
    """
    count = len(data)
    if count and (data.labels >= 0).all():
        # Classes have no length, so every exchange fits.
        giver = _derangement(np.zeros(count, np.int64), np.zeros(count, np.int64), 0, seed)
        return replace(data, labels=data.labels[giver])
    starts = np.asarray([_answer_start(data, index) for index in range(count)], dtype=np.int64)
    giver = _derangement(starts, data.lengths - starts, int(data.lengths.max(initial=0)), seed)
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    for taker, other in enumerate(giver.tolist()):
        (ids, mask), (other_ids, other_mask) = data.document(taker), data.document(other)
        start, other_start = int(starts[taker]), int(starts[other])
        documents.append(
            (np.concatenate([ids[:start], other_ids[other_start:]]), np.concatenate([mask[:start], other_mask[other_start:]]))
        )
    mixed = build_set(
        documents,
        rows=data.rows.tolist(),
        prompts=data.prompts,
        answers=[data.answers[index] for index in giver.tolist()] if data.answers else [],
    )
    return replace(mixed, stop_ids=data.stop_ids)


def _answer_start(data: TokenizedSet, index: int) -> int:
    _, supervised = data.document(index)
    return int(np.argmax(supervised)) if supervised.any() else len(supervised)


def _derangement(prompts: np.ndarray, answers: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Return int64[D]: whose answer each document gets, so that prompts[i] + answers[giver[i]] <= limit for every i.

    Two documents exchange their answers if both stay within the limit, so every intermediate state is valid, starting from the
    identity. Two rounds: the first shuffles, the second replaces answers that are still in their own place.
    """
    count = len(prompts)
    everyone = np.arange(count)
    giver = everyone.copy()
    random = generator(seed, SHUFFLED_ANSWERS)

    def allowed(index: int, partners: np.ndarray) -> np.ndarray:
        # Both documents must fit after the exchange, and neither may get its own answer back.
        fits = (prompts[index] + answers[giver[partners]] <= limit) & (prompts[partners] + answers[giver[index]] <= limit)
        return fits & (giver[partners] != index) & (giver[index] != partners) & (partners != index)

    for only_own in (False, True):
        for index in random.permutation(count).tolist():
            if only_own and giver[index] != index:
                continue
            drawn = random.integers(0, count, TRIES)
            found = drawn[allowed(index, drawn)]
            if not len(found) and giver[index] == index:
                found = everyone[allowed(index, everyone)]
            if len(found):
                partner = int(found[0])
                giver[index], giver[partner] = giver[partner], giver[index]
    return giver


REMEDY = "submit the same spec again: the sets are rebuilt from the same rows; or restore the file from a copy"


def load_known(path: Path | str) -> TokenizedSet:
    """Load a set of a run and compare it with the summary.json beside it; without a summary it is loaded unchecked.

    Raises:
        DataError: missing, or no tokenised set.
        IntegrityError: another content than was written.
    """
    path = Path(path)
    found = TokenizedSet.load(path)
    file = path.parent / "summary.json"
    if not file.exists():
        return found
    split = read_record(file, DataSummary).splits.get(path.stem)
    if split is not None and split.sha256 != found.sha256:
        raise IntegrityError(
            f"the tokenised set changed after it was written: sha256 {found.sha256}",
            where=str(path),
            expected=split.sha256,
            remedy=REMEDY,
        )
    return found
