"""Find rows with the same content: equal rows, equal prompts or texts, one group, near-duplicates.

A row's *question* is the model's input: the prompt, the turns of a chat before its last answer (without those of the
assistant), the text to classify, or the whole text. Two questions are equal if they are after normalisation
(`minhash.normalised`): Unicode's NFKC form, case folded, runs of white space as one space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from orchestrator.data.reading.examples import Example
from orchestrator.data.splitting.minhash import near_pairs, normalised

Kind = Literal["row", "question", "group", "near"]
INSTRUCTION = 0.5
"""Share of train's rows from which a common prompt counts as an instruction: the answers then distinguish the rows."""
MIN_INSTRUCTION_ROWS = 3


@dataclass(frozen=True)
class RowKeys:
    """Hashes of N rows, int64; 0 if a row has no such part. Python's own string hashes: equal within one process."""

    row: np.ndarray
    """[N]: hash of the whole row."""
    question: np.ndarray
    """[N]"""
    group: np.ndarray
    """[N]"""
    earlier_row: np.ndarray
    """[M]: a chat with several answers has several questions; the row of each one before the last."""
    earlier_question: np.ndarray
    """[M]"""

    def select(self, rows: np.ndarray) -> RowKeys:
        """Return the keys of some rows (bool[N])."""
        # New index of each kept row.
        number = np.cumsum(rows) - 1
        own = rows[self.earlier_row]
        return RowKeys(
            self.row[rows],
            self.question[rows],
            self.group[rows],
            number[self.earlier_row[own]],
            self.earlier_question[own],
        )


def row_keys(examples: Sequence[Example], instructions: frozenset[str] = frozenset()) -> RowKeys:
    """Return the keys of every row.

    Args:
        instructions: Normalised prompts that many rows share: for those the answer is part of the key.
    """
    earlier: list[tuple[int, int]] = []
    questions: list[int] = []
    for number, example in enumerate(examples):
        asked = questions_of(example)
        final = compared_text(example, asked, instructions)
        questions.append(_hash(final))
        if len(asked) > 1:
            earlier += [(number, _hash(question)) for question in asked[:-1] if question not in instructions]
    count = len(examples)
    return RowKeys(
        row=np.fromiter((_hash(example.content_key) for example in examples), np.int64, count),
        question=np.fromiter(questions, np.int64, count),
        group=np.fromiter((_hash(group_of(example)) for example in examples), np.int64, count),
        earlier_row=np.asarray([row for row, _ in earlier], np.int64),
        earlier_question=np.asarray([key for _, key in earlier], np.int64),
    )


def _hash(text: str) -> int:
    """Return an int64 that is the same in every process, unlike Python's own: rows that stay together must not differ between
    two runs.

    0 only for an empty text.
    """
    if not text:
        return 0
    # surrogatepass: text with lone surrogates is reported elsewhere, and must not fail here.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def group_of(example: Example) -> str:
    """Return the group's name; empty if the row has none or its cell is empty."""
    return example.group if example.group and example.group.removeprefix("group/").strip() else ""


def questions_of(example: Example) -> list[str]:
    """Return the normalised input before each answer; the last one is the row's question. Empty if there is no question."""
    if example.messages is None:
        question = normalised((example.prompt if example.text is None else example.text) or "")
        return [question] if question else []
    turns: list[str] = []
    found: list[str] = []
    answered = False
    for turn in example.messages:
        if turn["role"] == "assistant":
            # Consecutive assistant turns answer one question.
            if turns and not answered:
                found.append("\n".join(turns))
            answered = True
        # Without the assistant's turns: two chats ask the same even if earlier answers differ.
        elif content := normalised(str(turn.get("content") or "")):
            turns.append(content if turn["role"] != "system" else f"system: {content}")
            answered = False
    return found if any(turn["role"] == "user" for turn in example.messages) else []


def answer_of(example: Example) -> str:
    """Return the last answer, or the class; normalised."""
    if example.messages is not None:
        answers = [str(turn.get("content") or "") for turn in example.messages if turn["role"] == "assistant"]
        return normalised(answers[-1]) if answers else ""
    if example.label is not None:
        return example.label.strip()
    return normalised(example.completion or "")


def compared_text(example: Example, asked: Sequence[str], instructions: frozenset[str]) -> str:
    """Return the text by which a row is compared with others: its question, with the answer if the prompt is an instruction."""
    question = asked[-1] if asked else ""
    if question and question not in instructions:
        return question
    # A label is never part of the question: equal texts with different labels must stay together.
    answer = answer_of(example) if example.label is None else ""
    return f"{question}\n{answer}" if answer else question


def find_instructions(examples: Sequence[Example], questions: np.ndarray) -> dict[str, int]:
    """Return the normalised prompts that at least half of the rows have, with their counts. A text to classify never counts.

    Args:
        examples: Of train.
        questions: int64[N], their keys.
    """
    if not examples or examples[0].text is not None:
        return {}
    values, first, counts = np.unique(questions, return_index=True, return_counts=True)
    # At least three rows, or in a tiny set any prompt would count as an instruction.
    often = (values != 0) & (counts >= max(MIN_INSTRUCTION_ROWS, INSTRUCTION * len(examples)))
    asked = [questions_of(examples[at]) for at in first[often].tolist()]
    return {found[-1]: count for found, count in zip(asked, counts[often].tolist(), strict=True) if found}


@dataclass(frozen=True)
class _Questions(Sequence[str]):
    """Texts by which rows are compared, created on access: a million long texts need not be in memory twice."""

    examples: Sequence[Example]
    rows: np.ndarray
    instructions: frozenset[str]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return _Questions(self.examples, self.rows[index], self.instructions)
        example = self.examples[int(self.rows[index])]
        return compared_text(example, questions_of(example), self.instructions)


def near_clusters(examples: Sequence[Example], keys: RowKeys, instructions: frozenset[str]) -> np.ndarray:
    """Return int64[N]: one number for all rows whose questions are equal or near-duplicates; a row without a question is
    alone."""
    _, first, inverse = np.unique(keys.question, return_index=True, return_inverse=True)
    distinct = first[keys.question[first] != 0]
    roots = connected(len(distinct), near_pairs(_Questions(examples, distinct, instructions)))
    number = np.full(len(first), -1, np.int64)
    number[keys.question[first] != 0] = roots
    result = number[inverse]
    alone = result < 0
    result[alone] = len(distinct) + np.flatnonzero(alone)
    return result


def same_as(keys: RowKeys, others: RowKeys) -> dict[Kind, np.ndarray]:
    """Return for each kind bool[N]: whether a row's content, question or group occurs among `others`.

    The question of a chat also counts if it is asked in the middle of a longer one, and vice versa.
    """
    question = _among(keys.question, others.question) | _among(keys.question, others.earlier_question)
    question[keys.earlier_row[_among(keys.earlier_question, others.question)]] = True
    return {"row": _among(keys.row, others.row), "question": question, "group": _among(keys.group, others.group)}


def _among(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.isin(keys, others) & (keys != 0)


def components(keys: RowKeys, kinds: Iterable[Kind], clusters: np.ndarray | None) -> np.ndarray:
    """Return int64[N]: one number for all rows that are connected, directly or indirectly, by something they share.

    Args:
        kinds: What joins rows.
        clusters: Of near-duplicates, for kind `near`.
    """
    count = len(keys.row)
    everyone = np.arange(count)
    links: list[tuple[int, int]] = []
    for kind in kinds:
        if kind == "question":
            asked = _among(keys.earlier_question, keys.question)
            rows = np.concatenate([everyone, keys.earlier_row[asked]])
            links += _links(rows, np.concatenate([keys.question, keys.earlier_question[asked]]))
        elif kind == "near":
            assert clusters is not None
            # Key 0 means none, and clusters count from 0.
            links += _links(everyone, clusters + 1)
        else:
            links += _links(everyone, keys.row if kind == "row" else keys.group)
    return connected(count, links)


def _links(rows: np.ndarray, keys: np.ndarray) -> list[tuple[int, int]]:
    """Return edges from each row to the first one with the same key."""
    rows, keys = rows[keys != 0], keys[keys != 0]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    # Unique keys link nothing; leaving them out keeps the list short.
    shared = counts[inverse] > 1
    return list(zip(rows[first[inverse]][shared].tolist(), rows[shared].tolist(), strict=True))


def connected(count: int, links: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return int64[count]: the lowest member of each one's component (union-find with path halving; Tarjan and van Leeuwen
    1984)."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in links:
        a, b = root(first), root(second)
        if a != b:
            # The lowest index becomes the root, so the result does not depend on the order of the links.
            parent[max(a, b)] = min(a, b)
    return np.asarray([root(node) for node in range(count)], np.int64)
