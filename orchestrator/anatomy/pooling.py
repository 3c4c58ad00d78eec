"""Decide what a classifier reads of a text: from the spec, the base's folder, and what its transformers class does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from orchestrator.anatomy.values import ModelAnatomy, Pooling
from orchestrator.errors import BaseError, SelectionError
from orchestrator.spec.models import JobSpec

Read = Literal["mean", "cls", "last"]
CONFIG_KEYS: Mapping[str, Mapping[Read, Mapping[str, str]]] = {
    "modernbert": {"mean": {"classifier_pooling": "mean"}, "cls": {"classifier_pooling": "cls"}},
    "ultrabert": {"mean": {"classifier_pooling": "mean"}, "cls": {"classifier_pooling": "cls"}},
    "eurobert": {"mean": {"classifier_pooling": "mean"}, "cls": {"classifier_pooling": "bos"}},
}
"""Model types whose transformers class for sequence classification pools as its config says: the keys by pooling."""
MODULES = "modules.json"
"""The modules of a sentence encoder, as sentence-transformers writes them."""
OLD_KEYS: Mapping[str, Read] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
"""Keys of a pooling module's config.json, each true or false; newer versions have `pooling_mode` instead, which is `lasttoken`
for the last."""
TITLES: Mapping[Read, str] = {
    "mean": "the mean of a text's last hidden states",
    "cls": "the last hidden state of a text's first token",
    "last": "the last hidden state of a text's last token",
}


def pooled_for(anatomy: ModelAnatomy, spec: JobSpec) -> ModelAnatomy:
    """Return the anatomy with what the spec's classifier reads, and without tensors that it then does not need.

    `auto` is what a sentence encoder was trained with, else what the transformers class of the base does: the last token of a
    decoder; the class's own pooler or head of an encoder.

    Raises:
        SelectionError: `cls` on a decoder.
        BaseError: the files of a sentence encoder cannot be read.
    """
    if not spec.traits.head.is_new:
        return anatomy
    asked = spec.classify.pooling if spec.classify is not None else "auto"
    if asked == "auto":
        found = sentence_pooling(Path(anatomy.folder)) if anatomy.kind == "encoder" else None
        if found is None:
            return anatomy
        asked, why = found
    else:
        why = f"classify.pooling: {asked}"
    if anatomy.kind == "decoder" and asked == "cls":
        raise SelectionError(
            f"classify.pooling: cls on {anatomy.model_type!r}, a decoder, whose first token sees none of the text",
            expected="last, mean or auto",
            remedy="remove classify.pooling",
        )
    if anatomy.kind == "decoder" and asked == "last":  # what the transformers class does
        return anatomy
    config = CONFIG_KEYS.get(anatomy.model_type, {}).get(asked, {})
    reason = f"classified is {TITLES[asked]} ({why})"
    return with_pooling(anatomy, Pooling(kind=asked, config=dict(config), reason=reason))


def with_pooling(anatomy: ModelAnatomy, pooling: Pooling) -> ModelAnatomy:
    """Return the anatomy with this pooling. A head of ours needs no new tensors besides the classifier."""
    new = anatomy.new_tensors if pooling.by_class else ()
    return anatomy.model_copy(update={"pooling": pooling, "new_tensors": new})


def sentence_pooling(folder: Path) -> tuple[Read, str] | None:
    """Return (the pooling of a sentence encoder, the file that says it); None if the folder holds none, or another pooling.

    Raises:
        BaseError: a file is not what sentence-transformers writes.
    """
    modules = _read(folder / MODULES)
    if modules is None:
        place = "1_Pooling"
    else:
        entries = [cast("dict[str, Any]", entry) for entry in cast("list[Any]", modules) if isinstance(entry, dict)]
        place = next((str(entry.get("path")) for entry in entries if str(entry.get("type")).endswith(".Pooling")), "")
    config = _read(folder / place / "config.json") if place else None
    if not isinstance(config, dict):
        return None
    values = cast("dict[str, Any]", config)
    modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if isinstance(mode := values.get("pooling_mode"), str):
        modes = [{"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}.get(mode, f"pooling_mode_{mode}")]
    read = OLD_KEYS.get(modes[0]) if len(modes) == 1 else None
    return (read, f"{place}/config.json") if read is not None else None


def _read(path: Path) -> object:
    """Return the JSON value of a file; None if there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BaseError(f"not valid JSON: {error}", where=str(path), remedy="copy it from the base again") from None
