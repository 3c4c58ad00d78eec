"""Compare the tokens of the data with the rows that the base has for them: in its embeddings and in its output projection."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.data.encoding.encoder import Document
from orchestrator.data.encoding.turn_marks import strings_of
from orchestrator.data.reading.files import shown
from orchestrator.data.reading.gather import PLACES
from orchestrator.data.summary import LeftOut, Notice, listed
from orchestrator.errors import DataError, SelectionError
from orchestrator.spec.models import JobSpec
from orchestrator.spec.policy import parse_policy
from orchestrator.units import printable

Documents = Mapping[str, Sequence[Document]]
MAX_LISTED_TOKENS = 8
SAMPLED_ROWS = 512
"""Rows, evenly spread over the vocabulary, that tell what a trained row looks like."""
NEAR_MEAN, FAR = 0.2, 5.0
"""A row whose distance from the mean row, divided by the median of these distances, is outside of this range was never trained:
transformers' `resize_token_embeddings` puts new rows next to the mean."""


def compare_with_rows(documents: Documents, tokenizer: Any, anatomy: ModelAnatomy, spec: JobSpec, left_out: LeftOut) -> None:
    """Check that every token has a row, and warn of supervised tokens whose row was never trained.

    Raises:
        DataError: A token has none; names the tokens, and the rows of the data.
    """
    _check_vocabulary(documents, tokenizer, anatomy, left_out)
    _warn_of_untrained_tokens(documents, tokenizer, anatomy, spec, left_out)


def _check_vocabulary(documents: Documents, tokenizer: Any, anatomy: ModelAnatomy, left_out: LeftOut) -> None:
    """Check that every token of the data has a row in the embeddings.

    Raises:
        DataError: A token has none; names the tokens, and the rows of the data.
    """
    num_rows = anatomy.tensors[anatomy.embeddings[0]].shape[0]
    beyond = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if token >= num_rows}
    places: dict[int, list[str]] = {}
    for document in itertools.chain.from_iterable(documents.values()):
        found = {int(token) for token in document.ids[document.ids >= num_rows]}
        if beyond:
            # Where control tokens are read as ordinary text, what spells one was still meant as one.
            example = document.example
            text = "\n".join(strings_of([example.text, example.prompt, example.completion, example.messages, example.tools]))
            found |= {token for token, spelling in beyond.items() if spelling in text}
        for token in found:
            places.setdefault(token, []).append(left_out.relative(document.example.place))
    if not places:
        return
    named = [f"{_spelled(tokenizer, token)} is {token}, in {shown(places[token], PLACES)}" for token in sorted(places)]
    more = [f"and {len(named) - MAX_LISTED_TOKENS} more tokens"] if len(named) > MAX_LISTED_TOKENS else []
    raise DataError(
        f"the tokenizer has tokens that the base has no embedding for: {'; '.join([*named[:MAX_LISTED_TOKENS], *more])}",
        where=anatomy.folder,
        expected=f"token ids below {num_rows}, the rows of {anatomy.embeddings[0]}",
        remedy="list these tokens in base.add_tokens, which adds rows for them, or use the tokenizer that the base came with",
    )


def _warn_of_untrained_tokens(
    documents: Documents, tokenizer: Any, anatomy: ModelAnatomy, spec: JobSpec, left_out: LeftOut
) -> None:
    """Warn of supervised tokens whose row in the output projection was never trained, if no policy of the spec trains it.

    Only tokens that were added to the tokenizer are looked at: all others have rows that the base was trained with.
    """
    counts: Counter[int] = Counter()
    added = set(tokenizer.added_tokens_decoder)
    for document in documents["train"]:
        counts.update(added.intersection(np.unique(document.ids[document.supervised]).tolist()))
    weight = anatomy.tensors.get(anatomy.embeddings[0] if anatomy.tied else anatomy.head_weight)
    if not counts or weight is None or not weight.file or weight.parts or _trains_rows(spec):
        return
    untrained = [token for token in _untrained(Path(anatomy.folder), weight, sorted(counts)) if token not in anatomy.new_rows]
    if untrained:
        names = [f"{_spelled(tokenizer, token)} in {counts[token]}" for token in untrained[:MAX_LISTED_TOKENS]]
        notice = Notice(
            level="warning",
            message="the model cannot learn to write some tokens: their rows in the output projection were never trained and stay"
            f" frozen under every policy of this spec (rows of train with each: {listed(names, ', ')})",
            remedy="list them in base.add_tokens and add +new_tokens to the layers, or add +embeddings",
        )
        left_out.notices.append(notice)


def _trains_rows(spec: JobSpec) -> bool:
    """Return whether any policy of the spec trains rows of the embeddings or the output projection."""
    written = [*(spec.search.layers if spec.search else ()), *([spec.finetune.layers] if spec.finetune else [])]
    for text in written:
        try:
            policy = parse_policy(text)
        except SelectionError:
            continue
        if policy.kind == "head" or not {"head", "embeddings", "new_tokens"}.isdisjoint(policy.extras):
            return True
    return False


def _untrained(folder: Path, weight: TensorInfo, tokens: Sequence[int]) -> list[int]:
    """Return the tokens whose row [H] in `weight` [V, H] differs from what trained rows look like; none where only its file's
    header is known."""
    if not (folder / weight.file).is_file():
        return []
    from safetensors import safe_open

    with safe_open(folder / weight.file, framework="pt", device="cpu") as reader:
        rows = reader.get_slice(weight.stored_name or weight.name)
        known = [token for token in tokens if token < weight.shape[0]]
        sampled = sorted({int(row) for row in np.linspace(0, weight.shape[0] - 1, SAMPLED_ROWS)} - set(known))
        if len(sampled) < 2:
            return []
        values = {token: rows[token : token + 1][0].float().numpy() for token in (*sampled, *known)}
    mean = np.mean([values[row] for row in sampled], axis=0)
    usual = float(np.median([np.linalg.norm(values[row] - mean) for row in sampled]))
    distances = {token: float(np.linalg.norm(values[token] - mean)) / max(usual, 1e-12) for token in known}
    return [token for token, distance in distances.items() if not NEAR_MEAN <= distance <= FAR]


def _spelled(tokenizer: Any, token: int) -> str:
    return printable(repr(tokenizer.convert_ids_to_tokens(token)))
