"""Recognise a layout that is not in the table from the names and shapes of its stored tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from orchestrator.anatomy.config import unknown_layout, whole_number
from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.values import content_hash

RECOGNISED = "its layout is not in the table and was recognised from its tensors' names"
NUMBERED = re.compile(r"(?P<stack>.+?)\.(?P<number>\d+)\.(?P<rest>.+)")
BUFFERS = re.compile(r".*(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)")
"""Stored tensors that are not parameters: rotary frequencies and causal masks of older checkpoints."""
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
FLOATS = ("F64", "F32", "BF16", "F16")
Block = dict[str, TensorInfo]
"""Name within the block -> tensor."""


class _UnrecognisedError(Exception):
    """Raised for an expected part of a layout that was not found."""


def recognise(folder: Path, values: dict[str, Any], stored: Mapping[str, TensorInfo]) -> ModelAnatomy:
    """Return the anatomy that these tensors imply, as `plan_only`.

    It needs one stack of blocks `x.y.{n}.` numbered from 0, all with the same names and shapes; an input embedding
    [vocabulary, hidden] outside of it, and optionally an output projection of the same shape. Heads and positions are read
    from the config, all other sizes from the tensors.

    Raises:
        BaseError: one of these was not found.
    """
    path = folder / "config.json"
    try:
        return _recognise(folder, path, values, stored)
    except _UnrecognisedError as error:
        raise unknown_layout(path, values, f"looked for it in the tensors' names, and {error}") from None


def _recognise(folder: Path, path: Path, values: dict[str, Any], stored: Mapping[str, TensorInfo]) -> ModelAnatomy:
    stored = {name: tensor for name, tensor in stored.items() if not BUFFERS.fullmatch(name)}
    stack, blocks = _find_blocks(stored)
    outside = {name: tensor for name, tensor in stored.items() if not name.startswith(f"{stack}.")}
    embedding, head = _find_embedding(outside)
    vocab, hidden = stored[embedding].shape
    heads = _number(path, values, HEADS)
    if heads is None:
        raise _UnrecognisedError(f"config.json has none of {', '.join(HEADS)}")
    if _number(path, values, HIDDEN) not in (None, hidden):
        raise _UnrecognisedError(f"{embedding} is {hidden} wide, and config.json has another {' or '.join(HIDDEN)}")
    head_dim = _number(path, values, ("head_dim",)) or hidden // heads
    matrices = {name: tensor for name, tensor in blocks[0].items() if _is_matrix(tensor)}
    widths = [tensor.shape[1] for tensor in matrices.values() if tensor.shape[0] == hidden]
    if not widths:
        raise _UnrecognisedError(f"no matrix of a block gives {hidden} values, the width of {embedding}")
    prefix = f"{stack}.{{}}."
    gated = any(word in name for name in matrices for word in ("gate", "mlp.w3", "feed_forward.w3"))
    return ModelAnatomy(
        model_type=str(values["model_type"]),
        kind=_kind(values),
        folder=str(folder),
        has_weights=False,
        num_blocks=len(blocks),
        hidden_size=hidden,
        intermediate_size=max(widths),
        num_heads=heads,
        num_kv_heads=_number(path, values, KV_HEADS) or heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_positions=_positions(path, values, outside, embedding),
        tied=not head,
        block_prefix=prefix,
        blocks_module=stack,
        backbone=stack.partition(".")[0],
        head_weight=head or "lm_head.weight",
        classifier_weight="score.weight",
        embeddings=(embedding, *(name for name in outside if _is_matrix(outside[name]) and name not in (embedding, head))),
        final_norm=tuple(name for name, tensor in outside.items() if tensor.shape == (hidden,)),
        blocks=tuple(tuple(prefix.format(number) + name for name in block) for number, block in enumerate(blocks)),
        linears=tuple(tuple(prefix.format(number) + name for name in matrices) for number in range(len(blocks))),
        stacked=tuple(() for _ in blocks),
        norm="layer" if any("norm" in name or "ln" in name for name in blocks[0] if name.endswith(".bias")) else "rms",
        mlp="gated" if gated else "plain",
        activation=next((value for key in ACTIVATIONS if isinstance(value := values.get(key), str)), "silu" if gated else "gelu"),
        plan_only=RECOGNISED,
        tensors=dict(stored),
        config_sha256=content_hash(values),
    )


def _find_blocks(stored: Mapping[str, TensorInfo]) -> tuple[str, list[Block]]:
    """Return the name of the module list and its blocks in order."""
    stacks: dict[str, dict[int, Block]] = {}
    for name, tensor in stored.items():
        if match := NUMBERED.fullmatch(name):
            stacks.setdefault(match["stack"], {}).setdefault(int(match["number"]), {})[match["rest"]] = tensor
    # A numbered list without any matrix is no stack of blocks.
    found = {stack: blocks for stack, blocks in stacks.items() if any(map(_is_matrix, _tensors(blocks.values())))}
    if len(found) != 1:
        names = ", ".join(f"{stack}.{{n}}." for stack in sorted(found)) or "none"
        raise _UnrecognisedError(f"found {len(found)} repeated blocks x.y.{{n}}. with matrices where one was looked for: {names}")
    ((stack, numbered),) = found.items()
    if sorted(numbered) != list(range(len(numbered))):
        raise _UnrecognisedError(f"the blocks {stack}.{{n}}. are not numbered from 0 to {max(numbered)}")
    blocks = [numbered[number] for number in range(len(numbered))]
    for number, block in enumerate(blocks):
        if {name: tensor.shape for name, tensor in block.items()} != {name: tensor.shape for name, tensor in blocks[0].items()}:
            raise _UnrecognisedError(f"{stack}.{number}. does not have the names and shapes of {stack}.0.")
    # A quantized checkpoint packs several weights into one stored element.
    packed = [name for name, tensor in blocks[0].items() if tensor.dtype not in FLOATS]
    if packed:
        raise _UnrecognisedError(f"{stack}.0.{packed[0]} is stored as {blocks[0][packed[0]].dtype}, so its shape may be another")
    experts = sorted(name for name, tensor in blocks[0].items() if "expert" in name or len(tensor.shape) > 2)
    if experts:
        raise _UnrecognisedError(
            f"{stack}.0.{experts[0]} belongs to a mixture of experts or a convolution, which its name does not show"
        )
    return stack, blocks


def _tensors(blocks: Iterable[Block]) -> Iterable[TensorInfo]:
    return (tensor for block in blocks for tensor in block.values())


def _find_embedding(outside: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """Return the names of the input embedding and of the output projection; the second is empty if it is tied."""
    matrices = {name: tensor for name, tensor in outside.items() if _is_matrix(tensor)}
    largest = max((tensor.shape for tensor in matrices.values()), key=lambda shape: shape[0] * shape[1], default=(0, 0))
    tables = [name for name, tensor in matrices.items() if tensor.shape == largest]
    heads = [name for name in tables if re.search(r"head|out|unembed", name)]
    embeddings = [name for name in tables if name not in heads]
    if len(embeddings) != 1 or len(heads) > 1 or not re.search(r"emb|wte|tok", embeddings[0]):
        named = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in matrices.items()) or "none"
        raise _UnrecognisedError(f"an embedding [vocabulary, hidden] is not among the matrices outside the blocks: {named}")
    return embeddings[0], heads[0] if heads else ""


def _positions(path: Path, values: dict[str, Any], outside: Mapping[str, TensorInfo], embedding: str) -> int:
    number = _number(path, values, POSITIONS)
    if number is None:
        tables = [tensor.shape[0] for name, tensor in outside.items() if name != embedding and re.search(r"wpe|pos", name)]
        number = max(tables, default=None)
    if number is None:
        raise _UnrecognisedError(f"config.json has none of {', '.join(POSITIONS)}")
    return number


def _kind(values: dict[str, Any]) -> Literal["decoder", "encoder"]:
    """Return the kind by the class that the config names: a decoder unless it is for masked LM or classification."""
    named = " ".join(map(str, values.get("architectures") or ()))
    return "encoder" if re.search(r"MaskedLM|ForSequenceClassification|ForImageClassification", named) else "decoder"


def _number(path: Path, values: dict[str, Any], keys: Iterable[str]) -> int | None:
    return next((whole_number(path, key, values[key]) for key in keys if values.get(key) is not None), None)


def _is_matrix(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2
