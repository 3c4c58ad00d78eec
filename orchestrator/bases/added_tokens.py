"""A base with more tokens: a folder beside the base's own, with rows for new tokens in its embeddings and output projection.

Files without such rows are linked, so that it takes the disk space of the files that hold the embeddings.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.anatomy import ModelAnatomy, TensorInfo, read_anatomy
from orchestrator.anatomy.reader import ADDED_TOKENS
from orchestrator.anatomy.weights import AGAIN, header_file, read_header
from orchestrator.bases.files import TOKENIZER_PATTERNS
from orchestrator.errors import BaseError, UsageError
from orchestrator.store import base_identity, output_to, read_json, write_json
from orchestrator.store.files import partial_path, usual_mode
from orchestrator.values import content_hash

WEIGHT_SUFFIXES = (".safetensors", ".header", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
Step = Literal["plan", "data", "training"]
REMEDY = "free space there, or grant write permission; ORCHESTRATOR_CACHE and --output name other folders"


def made_from(source: Path, tokens: Sequence[str]) -> str:
    """Return a hash of what decides an enlarged base: the base's config and weights, or their headers, and the tokens."""
    files = [path.name for path in source.iterdir() if path.suffix in (".safetensors", ".header")]
    return content_hash({"base": base_identity(source, files), "tokens": list(tokens)})


def is_made_from(target: Path, origin: str) -> bool:
    """Return whether `target` is an enlarged base with this `made_from`."""
    record = target / ADDED_TOKENS
    return record.is_file() and read_json(record)["made_from"] == origin


def with_added_tokens(
    source: Path, tokenizer_folder: Path, tokens: Sequence[str], target: Path, *, step: Step = "training"
) -> Path:
    """Return a folder with a base and these tokens; made where it is not there yet.

    A token that the tokenizer already has keeps its id and its row. A new one gets the next free id, and as its row the mean of
    the rows of the tokens before it (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").

    Args:
        source: Folder of the base, with its weights or only with their headers, as then the result.
        tokenizer_folder: Has the tokenizer and the small files, where `source` has only headers.
        target: Folder to make; the same base and tokens give the same folder.
        step: What the folder is for. All but training gets headers in place of weights; a plan gets no tokenizer, and imports no
            torch to count its tokens.

    Raises:
        BaseError: The base has no tokenizer, or its weights cannot be read.
        UsageError: The disk is full or cannot be written.
    """
    origin = made_from(source, tokens)
    if is_made_from(target, origin):
        return target
    anatomy = read_anatomy(source, need_weights=False)
    # Another process may be making the same folder.
    partial = partial_path(target)
    try:
        with output_to(target, remedy=REMEDY):
            partial.mkdir(parents=True)
            num_before, num_tokens, ids = _write_tokenizer(tokenizer_folder, tokens, partial, step)
            _write_config(source, partial, max(num_tokens, anatomy.tensors[anatomy.embeddings[0]].shape[0]))
            write = _write_weights if step == "training" else _write_header
            for file in anatomy.weight_files:
                write(source / file, partial / file, _enlarged(anatomy), num_before, num_tokens)
            _link_others(source, partial)
            _link_others(tokenizer_folder, partial)
            write_json(partial / ADDED_TOKENS, {"made_from": origin, "tokens": list(tokens), "ids": list(ids)})
            _put_in_place(partial, target, origin)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _put_in_place(partial: Path, target: Path, origin: str) -> None:
    """Rename the finished folder to `target`, unless another process has just put the same one there."""
    if is_made_from(target, origin):
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        partial.rename(target)
    except OSError:
        if not is_made_from(target, origin):
            raise


def _write_tokenizer(source: Path, tokens: Sequence[str], target: Path, step: Step) -> tuple[int, int, tuple[int, ...]]:
    """Save the tokenizer with the tokens, except for a plan; return its size before and after, and the ids of the tokens."""
    from transformers import AddedToken

    if step == "plan" and (source / "tokenizer.json").is_file():
        # AutoTokenizer imports torch.
        from transformers import PreTrainedTokenizerFast as Tokenizer
    else:
        from transformers import AutoTokenizer as Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "copy the tokenizer's files into the base's folder, or remove base.add_tokens"
        raise BaseError(f"no tokenizer to add tokens to: {first_line}", where=str(source), remedy=remedy) from None
    num_before, known = len(tokenizer), tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
    if step != "plan":
        try:
            tokenizer.save_pretrained(target)
        except OSError:
            raise
        except Exception as error:  # as above
            raise UsageError(f"cannot be written: {error}", where=str(target.parent), remedy=REMEDY) from None
    return num_before, len(tokenizer), tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def _write_config(source: Path, target: Path, num_rows: int) -> None:
    config: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    # In a model with a text part, that part has the vocabulary.
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    text["vocab_size"] = max(num_rows, int(text.get("vocab_size", 0)))
    write_json(target / "config.json", config)


def _enlarged(anatomy: ModelAnatomy) -> set[str]:
    """Return the stored names of the tensors that have a row for each token."""
    names = {anatomy.embeddings[0], anatomy.head_weight, anatomy.head_bias} - {""}
    stored = {info.stored_name or info.name for name in names if (info := anatomy.tensors.get(name)) is not None}
    return stored | {copy.stored_name for copy in anatomy.copies if copy.name in names}


def _write_weights(source: Path, target: Path, enlarged: set[str], num_before: int, num_tokens: int) -> None:
    """Write one weight file with more rows where it has rows of tokens; link it where it has none."""
    if not source.is_file():
        _write_header(source, target, enlarged, num_before, num_tokens)
        return
    grown = _grown(read_header(source), enlarged, num_before, num_tokens)
    if not grown:
        _link(source, target)
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        tensors = load_file(source)
    except (OSError, SafetensorError) as error:
        raise BaseError(f"the weights cannot be read: {error}", where=str(source), remedy=AGAIN) from None
    tensors |= {name: _with_rows(tensors[name], num_before, num_tokens) for name in grown}
    try:
        save_file(tensors, target, {"format": "pt"})
    except SafetensorError as error:
        raise UsageError(f"cannot be written: {error}", where=str(target.parent), remedy=REMEDY) from None
    # The library's files are for their owner alone.
    target.chmod(usual_mode(target.parent))


def _grown(header: dict[str, TensorInfo], enlarged: set[str], num_before: int, num_tokens: int) -> set[str]:
    """Return the names of the tensors of one file that get or change rows."""
    return {name for name in enlarged & set(header) if header[name].shape[0] < num_tokens or num_before < num_tokens}


def _write_header(source: Path, target: Path, enlarged: set[str], num_before: int, num_tokens: int) -> None:
    """Write the header alone of a weight file, as it will be with more rows."""
    header = read_header(source)
    grown = _grown(header, enlarged, num_before, num_tokens)
    entries: dict[str, Any] = {}
    end = 0
    for name, info in header.items():
        rows = max(info.shape[0], num_tokens) if name in grown else None
        begin, end = end, end + (info.num_bytes if rows is None else info.num_bytes // info.shape[0] * rows)
        shape = list(info.shape) if rows is None else [rows, *info.shape[1:]]
        entries[name] = {"dtype": info.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    size = 8 + len(text) + end
    header_file(target).write_bytes(struct.pack("<QQ", size, len(text)) + text)


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


def _link_others(source: Path, target: Path) -> None:
    """Link the files beside the weights that were not written; the index of the shards still holds."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts)
        written = (target / place).exists() or any(place.match(pattern) for pattern in TOKENIZER_PATTERNS)
        if path.is_file() and not (hidden or written or path.suffix in WEIGHT_SUFFIXES):
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            _link(path, target / place)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
