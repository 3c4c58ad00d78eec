"""Divide the retention set into text that is scored and text that may be trained on."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.data.encoding.encoder import Document
from orchestrator.data.rng import RETENTION, generator
from orchestrator.data.summary import LeftOut
from orchestrator.errors import DataError
from orchestrator.plan.remedies import most_replayed_tokens, needs_replayed_text
from orchestrator.spec import LoadedSpec


def retention_sets(loaded: LoadedSpec, documents: Mapping[str, list[Document]], left_out: LeftOut) -> dict[str, list[Document]]:
    """Return `retain`, which is scored, and `replay`, if any trial replays retention text: neither shares text with another
    split.

    Args:
        documents: Of train, eval, test and the whole retention set.
        left_out: Gets what is in neither.

    Raises:
        DataError: nothing is left of one of them.
    """
    spec = loaded.spec
    own = apart(loaded, documents, left_out)
    scored, rest = within_tokens(own, spec.data.retain_tokens, spec.train.seed)
    if needs_replayed_text(spec):
        train_tokens = sum(len(document.ids) for document in documents["train"])
        return {"retain": scored, "replay": replayed(loaded, scored, rest, train_tokens, left_out)}
    for document in rest:
        left_out.add("retain", f"over data.retain_tokens = {spec.data.retain_tokens} (chunks)", document.example.place)
    return {"retain": scored}


def apart(loaded: LoadedSpec, documents: Mapping[str, list[Document]], left_out: LeftOut) -> list[Document]:
    """Return the retention documents that occur in no other split.

    Text in train says nothing about forgetting; text in eval or test must not be trained on, and test is not read before the
    verdict.

    Raises:
        DataError: none is left.

    """
    # Compared by tokens, since retention rows and others may spell the same text in different columns. The last split wins: test
    # over train.
    keepers = {document.ids.tobytes(): name for name in ("train", "eval", "test") for document in documents[name]}
    kept: list[Document] = []
    for document in documents["retain"]:
        keeper = keepers.get(document.ids.tobytes())
        if keeper is None:
            kept.append(document)
        else:
            left_out.add("retain", f"also occurs in {keeper}", document.example.place)
    if not kept:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.of("retain").items())
        raise DataError(
            f"no row is left for retain ({reasons})",
            where=loaded.where("data.retain"),
            expected="text that is not in train, eval or test",
            remedy="give different text",
        )
    return kept


def within_tokens(documents: list[Document], budget: int, seed: int) -> tuple[list[Document], list[Document]]:
    """Return (a seeded choice of whole chunks of at most `budget` tokens together, at least one; the rest)."""
    chosen: set[int] = set()
    tokens = 0
    for index in generator(seed, RETENTION).permutation(len(documents)).tolist():
        # At least one chunk, even if it alone exceeds the budget; later, shorter chunks may still fit.
        if not chosen or tokens + len(documents[index].ids) <= budget:
            chosen.add(index)
            tokens += len(documents[index].ids)
    parts: tuple[list[Document], list[Document]] = ([], [])
    for index, document in enumerate(documents):
        parts[index not in chosen].append(document)
    return parts


def replayed(
    loaded: LoadedSpec, scored: list[Document], rest: list[Document], train_tokens: int, left_out: LeftOut
) -> list[Document]:
    """Return the retention chunks to train on: not scored, nor equal to a scored one; a seeded choice of as many as a trial
    can replay.

    Args:
        train_tokens: Number of tokens of the training set.
        left_out: Gets the others.

    Raises:
        DataError: all of the chunks are scored or equal to scored ones.
    """
    known = {document.ids.tobytes() for document in scored}
    others: list[Document] = []
    for document in rest:
        if document.ids.tobytes() in known:
            left_out.add("replay", "equal to a chunk that is scored", document.example.place)
        else:
            others.append(document)
    kept, beyond = within_tokens(others, most_replayed_tokens(loaded.spec, train_tokens), loaded.spec.train.seed)
    for document in beyond:
        left_out.add("replay", "more than a trial can replay (chunks)", document.example.place)
    if not kept:
        tokens = sum(len(document.ids) for document in scored)
        raise DataError(
            f"no retention text is left for replay: all {tokens} tokens that are in no other split are scored",
            where=loaded.where("data.retain"),
            expected="more text than data.retain_tokens, since scored text must not be trained on",
            remedy=f"more text, or a data.retain_tokens below {tokens}",
        )
    return kept
