"""A base with more tokens: a folder beside the base's own, with rows for new tokens in its embeddings and output projection.

Files without such rows are linked, so that it takes the disk space of the files that hold the embeddings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.anatomy.weights import INDEX, read_header
from orchestrator.errors import BaseError
from orchestrator.store import read_json, write_json
from orchestrator.values import content_hash

RECORD = "added_tokens.orchestrator.json"
"""Written last: what the folder was made from, and the ids of the new tokens."""
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


def with_added_tokens(
    source: Path, tokens: Sequence[str], target: Path, anatomy: ModelAnatomy | None
) -> tuple[Path, tuple[int, ...]]:
    """Return a base's folder with these tokens, and their ids in the order of `tokens`; made where it is not there yet.

    A token that the tokenizer already has keeps its id and its row. A new one gets the next free id, and as its row the mean of
    the rows of the tokens before it (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").

    Args:
        source: Folder of the base.
        target: Folder to make; the same base and tokens give the same folder.
        anatomy: The base's, to find its weights; None to make a folder without weights, enough to plan and to tokenise.

    Raises:
        BaseError: The base has no tokenizer, or its weights cannot be read.
        OSError: The disk is full or cannot be written.
    """
    made_from = content_hash({"source": str(source.resolve()), "tokens": list(tokens), "weights": anatomy is not None})
    if (target / RECORD).is_file() and (known := read_json(target / RECORD))["made_from"] == made_from:
        return target, tuple(known["ids"])
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    num_before, num_tokens, ids = _write_tokenizer(source, tokens, partial)
    _write_config(source, partial, num_tokens)
    if anatomy is not None:
        _write_weights(source, partial, anatomy, num_before, num_tokens)
    _link_others(source, partial, with_weights=anatomy is not None)
    write_json(partial / RECORD, {"made_from": made_from, "ids": list(ids)})
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target, ids


def _write_tokenizer(source: Path, tokens: Sequence[str], target: Path) -> tuple[int, int, tuple[int, ...]]:
    """Save the tokenizer with the tokens; return its size before and after, and the ids of the tokens."""
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "copy the tokenizer's files into the base's folder, or remove base.add_tokens"
        raise BaseError(f"no tokenizer to add tokens to: {first_line}", where=str(source), remedy=remedy) from None
    num_before, known = len(tokenizer), tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
    tokenizer.save_pretrained(target)
    return num_before, len(tokenizer), tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def _write_config(source: Path, target: Path, num_tokens: int) -> None:
    config: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    # In a model with a text part, that part has the vocabulary.
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    text["vocab_size"] = max(num_tokens, int(text.get("vocab_size", 0)))
    write_json(target / "config.json", config)


def _write_weights(source: Path, target: Path, anatomy: ModelAnatomy, num_before: int, num_tokens: int) -> None:
    """Write the files that hold the embeddings or the output projection, with more rows in both."""
    from safetensors.torch import load_file, save_file

    enlarged = {
        info.stored_name or info.name
        for name in (anatomy.embeddings[0], anatomy.head_weight, anatomy.head_bias)
        if (info := anatomy.tensors.get(name)) is not None
    } | {anatomy.head_weight}
    total = 0
    for file in anatomy.weight_files:
        header = read_header(source / file)
        total += sum(info.num_bytes for info in header.values())
        if not enlarged & set(header):
            continue
        tensors = load_file(source / file)
        for name in enlarged & set(header):
            before = tensors[name].nbytes
            tensors[name] = _with_rows(tensors[name], num_before, num_tokens)
            total += tensors[name].nbytes - before
        save_file(tensors, target / file, {"format": "pt"})
    if (source / INDEX).is_file():
        index: dict[str, Any] = json.loads((source / INDEX).read_bytes())
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_json(target / INDEX, index)


def _with_rows(weight: Any, num_before: int, num_tokens: int) -> Any:
    """Return [V, ...] with at least `num_tokens` rows; those from `num_before` on are the mean of the rows before."""
    import torch

    if num_tokens <= num_before:
        return weight
    rows = max(weight.shape[0], num_tokens)
    trained = weight[: min(num_before, weight.shape[0])]
    result = torch.cat([weight, weight.new_zeros(rows - weight.shape[0], *weight.shape[1:])])
    result[num_before:num_tokens] = trained.float().mean(0).to(weight.dtype)
    return result


def _link_others(source: Path, target: Path, *, with_weights: bool) -> None:
    """Link what was not written: other weights, and the files beside them."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        weights = path.suffix == ".safetensors" or path.name == INDEX
        replaced = place.exists() or any(path.match(pattern) for pattern in TOKENIZER_PATTERNS)
        if path.is_dir() or replaced or (weights and not with_weights) or any(part.startswith(".") for part in place.parts[-2:]):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), place)
        except OSError:
            shutil.copyfile(path, place)
