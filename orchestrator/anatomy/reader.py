"""Read a base's folder as its anatomy."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from orchestrator.anatomy.config import BaseConfig, OtherLayoutError, find_layout, plan_only_error, read_config, read_values
from orchestrator.anatomy.encoded import decoded
from orchestrator.anatomy.layouts import TensorTemplate, axis_size, present
from orchestrator.anatomy.learned import NotLearnedError, learn
from orchestrator.anatomy.odd import no_head_error, settle
from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.anatomy.weights import INDEX, SINGLE, read_weights
from orchestrator.errors import BaseError
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec.tasks import TASKS, Task
from orchestrator.values import content_hash

TRAINABLE_DTYPES = ("F32", "BF16", "F16")


ENCODER_FROZEN = (
    "an encoder-decoder: the encoder reads the prompt and stays frozen, `layers` numbers the blocks of the decoder; FLOPs and "
    "hours leave out the encoder, and memory is planned as if both sides read whole rows"
)


def resolve_base(model: str, spec_folder: Path) -> Path:
    """Return the folder of `base.model`: the sample, or a folder relative to the spec's."""
    if model == "sample":
        return Path(SAMPLE_BASE).resolve()
    return (spec_folder / Path(model).expanduser()).resolve()


ADDED_TOKENS = "added_tokens.orchestrator.json"
"""File of a base's folder, written by `bases.added_tokens`: which tokens were added to it."""


def read_anatomy(folder: Path | str, *, need_weights: bool, task: Task = "completion") -> ModelAnatomy:
    """Read blocks, names, shapes and types of a base from config.json and safetensors headers only.

    The table of layouts is used where it describes the base. Whatever it does not have, or has as `plan_only`, and a checkpoint
    with other names than its row, is learned from the transformers class (`learned.py`).

    Without weights in the folder the tensors are those that the config implies, in its dtype, and `has_weights` is False:
    enough to plan.

    Args:
        folder: Folder with config.json.
        need_weights: True if the base is to be trained.
        task: What it is to be trained for: decides which class is loaded, and so which tensors it needs.

    Raises:
        BaseError: see `read_values`, `read_config`, `read_weights` and `learn`; weights that are needed and missing, quantized,
            or not those of the config; an encoder-decoder for another task than completing prompts.
    """
    folder = Path(folder).resolve()
    values = read_values(folder)
    stored = read_weights(folder)
    if stored is None and need_weights:
        raise BaseError(
            "the folder has a config but no weights: it can be planned for, not trained",
            where=str(folder),
            expected=f"{SINGLE}, or shards with {INDEX}",
            remedy="put the base's safetensors files there, or point `base.model` at a folder that has them",
        )
    notes: tuple[str, ...] = ()
    if stored is not None:
        stored, notes = decoded(folder, values, stored)
    anatomy = _read(folder, values, stored, task=task, need_weights=need_weights).model_copy(update={"notes": notes})
    if need_weights and anatomy.plan_only:
        raise plan_only_error(folder / "config.json", anatomy.model_type, anatomy.plan_only)
    if anatomy.kind == "encoder_decoder":
        _check_completes(anatomy, task)
        notes = (*notes, ENCODER_FROZEN)
        anatomy = anatomy.model_copy(update={"notes": notes})
    anatomy = settle(anatomy, stored or {}, head_is_new=TASKS[task].head.is_new)
    return anatomy.model_copy(update={"new_rows": _new_rows(folder)})


def _check_completes(anatomy: ModelAnatomy, task: Task) -> None:
    """Check that an encoder-decoder is to complete prompts.

    Called with `input_ids` alone, BART makes the decoder's input of them: it sees the tokens that it is to predict. So what the
    encoder reads must be known, which only a completion tells.

    Raises:
        BaseError: another task.
    """
    if not TASKS[task].two_texts:
        raise BaseError(
            f"task {task!r} on {anatomy.model_type!r}, an encoder-decoder, which is not trained for that yet",
            where=str(Path(anatomy.folder) / "config.json"),
            expected="`task: completion`: the encoder reads the prompt, and the decoder learns the completion",
            remedy="set `task: completion`, or use a base without a separate encoder",
        )


def _new_rows(folder: Path) -> tuple[int, ...]:
    """Return the ids of the tokens that `base.add_tokens` added to the base in this folder."""
    file = folder / ADDED_TOKENS
    return tuple(json.loads(file.read_bytes())["ids"]) if file.is_file() else ()


def _read(
    folder: Path, values: dict[str, Any], stored: dict[str, TensorInfo] | None, *, task: Task, need_weights: bool
) -> ModelAnatomy:
    layout = find_layout(values)
    if layout is None:
        return learn(folder, values, stored, task=task)
    try:
        config = read_config(folder, values, layout)
        return _from_table(folder, config, stored)
    except OtherLayoutError as other:
        return _learned_instead(folder, values, stored, other, task=task, need_weights=need_weights)


def _from_table(folder: Path, config: BaseConfig, stored: dict[str, TensorInfo] | None) -> ModelAnatomy:
    """Return the anatomy that a row of the table gives.

    Raises:
        OtherLayoutError: the row is for planning only, or the checkpoint has other names.
        BaseError: tensors of other shapes, or quantized ones.
    """
    if config.plan_only:
        raise OtherLayoutError(plan_only_error(config.path, config.layout.model_type, config.plan_only), config)
    if stored is None:
        return implied_anatomy(config)
    expected = _expected(config)
    pooler = {template.name for template in config.layout.pooler}
    tensors = _match(folder, config, expected, optional=pooler, stored=stored)
    return _assemble(config, expected, tensors, has_weights=True).model_copy(update={"copies": _copies(config, stored)})


def _copies(config: BaseConfig, stored: dict[str, TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the tied output projection, if it is stored besides the embedding."""
    layout = config.layout
    head = layout.stored_as.get(layout.head_weight, layout.head_weight)
    if not config.tied or head not in stored:
        return ()
    return (stored[head].model_copy(update={"name": layout.embeddings[0].name, "stored_name": head}),)


def _learned_instead(
    folder: Path,
    values: dict[str, Any],
    stored: dict[str, TensorInfo] | None,
    other: OtherLayoutError,
    *,
    task: Task,
    need_weights: bool,
) -> ModelAnatomy:
    """Learn a base that its row of the table does not describe.

    A row of a type that has no class for texts is still good for planning.

    Raises:
        NotLearnedError: the stored tensors are not those of the class.
        BaseError: as the row says, if the class cannot be built.
    """
    try:
        return learn(folder, values, stored, task=task)
    except NotLearnedError as refused:
        if refused.kind == "no_class" and other.config is not None and not need_weights:
            if stored is not None:
                _check_count(folder, other.config, _expected(other.config), stored)
            return implied_anatomy(other.config)
        if refused.kind == "weights":
            raise
        raise other.error from refused


def implied_anatomy(config: BaseConfig) -> ModelAnatomy:
    """Return what the table implies of a config alone; its tensors are in no file."""
    expected = _expected(config)
    new = {template.name for template in config.layout.pooler} if config.layout.pooler_is_new else set[str]()
    tensors = {
        name: TensorInfo(name=name, shape=shape, dtype=config.dtype) for name, shape in expected.items() if name not in new
    }
    return _assemble(config, expected, tensors, has_weights=False)


def _expected(config: BaseConfig) -> dict[str, tuple[int, ...]]:
    return {name: _shape(template, config) for name, template in _all_templates(config).items()}


def _blocks(config: BaseConfig) -> list[dict[str, TensorTemplate]]:
    """Return the tensors of each block by complete name."""
    dense = present(config.layout.block, config.flags)
    sparse = present(config.layout.sparse_block, config.flags)
    blocks: list[dict[str, TensorTemplate]] = []
    for number in range(config.sizes["blocks"]):
        prefix = config.layout.block_prefix.format(number)
        blocks.append({prefix + template.name: template for template in (sparse if number in config.sparse else dense)})
    return blocks


def _all_templates(config: BaseConfig) -> dict[str, TensorTemplate]:
    """Return every tensor that the config implies, in the order of the forward pass."""
    layout = config.layout
    templates = {template.name: template for template in layout.embeddings}
    for block in _blocks(config):
        templates |= block
    templates |= {template.name: template for template in present((*layout.final_norm, *layout.pooler), config.flags)}
    if layout.kind == "decoder" and not config.tied:
        templates[layout.head_weight] = TensorTemplate(layout.head_weight, ("vocab", "hidden"), linear=True)
    if layout.head_bias:
        templates[layout.head_bias] = TensorTemplate(layout.head_bias, ("vocab",))
    return templates


def _shape(template: TensorTemplate, config: BaseConfig) -> tuple[int, ...]:
    return tuple(axis_size(axis, config.sizes) for axis in template.shape)


def _tolerated(config: BaseConfig, name: str) -> bool:
    """Return whether a stored tensor is not a parameter of the model and can be ignored."""
    patterns = (*config.layout.ignored, *([config.layout.head_weight] if config.tied else []))
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_count(folder: Path, config: BaseConfig, expected: dict[str, tuple[int, ...]], stored: dict[str, TensorInfo]) -> None:
    """Check a checkpoint with other names: it must have as many elements as the config implies."""
    found = sum(tensor.num_elements for name, tensor in stored.items() if not _tolerated(config, name))
    implied = sum(math.prod(shape) for shape in expected.values())
    if found != implied:
        raise BaseError(
            f"{found:,} weights are stored",
            where=str(folder),
            expected=f"{implied:,} by config.json, for a {config.layout.model_type}",
            remedy="config.json and weights must belong to the same model; copy both from the same source",
        )


def _match(
    folder: Path,
    config: BaseConfig,
    expected: dict[str, tuple[int, ...]],
    *,
    optional: set[str],
    stored: dict[str, TensorInfo],
) -> dict[str, TensorInfo]:
    """Return the stored tensors by parameter name, after comparing names, shapes and types with the config."""
    prefix = config.layout.backbone + "."
    tensors: dict[str, TensorInfo] = {}
    for name, shape in expected.items():
        # A checkpoint may store a parameter under another name of its layout, or without the backbone's prefix.
        spellings = (name, config.layout.stored_as.get(name, name), name.removeprefix(prefix))
        tensor = next((stored[spelling] for spelling in spellings if spelling in stored), None)
        if tensor is None:
            continue
        tensors[name] = tensor.model_copy(update={"name": name, "stored_name": "" if tensor.name == name else tensor.name})
        if tensor.shape != shape:
            raise BaseError(
                f"{tensor.name} has shape {list(tensor.shape)} in {tensor.file}",
                where=str(folder),
                expected=f"{list(shape)} by config.json",
                remedy="config.json and weights belong to different models; copy both from the same source",
            )
        if tensor.dtype not in TRAINABLE_DTYPES:
            raise BaseError(
                f"{tensor.name} is stored as {tensor.dtype}",
                where=str(folder / tensor.file),
                expected=" | ".join(TRAINABLE_DTYPES),
                remedy="give the original weights and let `base.quantize: nf4` quantize them in memory",
            )
    _check_names(folder, config, expected, optional, stored, tensors)
    return tensors


def _check_names(
    folder: Path,
    config: BaseConfig,
    expected: dict[str, tuple[int, ...]],
    optional: set[str],
    stored: dict[str, TensorInfo],
    tensors: dict[str, TensorInfo],
) -> None:
    missing = [name for name in expected if name not in tensors and name not in optional]
    head = config.layout.head_weight
    if missing:
        raise OtherLayoutError(
            no_head_error(folder, head, stored)
            if missing == [head]
            else BaseError(
                f"{len(missing)} tensors missing: {', '.join(missing[:3])}",
                where=str(folder),
                expected=f"the {len(expected)} tensors of a {config.layout.model_type} with {config.sizes['blocks']} blocks",
                remedy="copy the base again; config.json and weights must belong to the same model",
            )
        )
    used = {tensor.stored_name or tensor.name for tensor in tensors.values()}
    extra = [name for name in stored if name not in used and not _tolerated(config, name)]
    if extra:
        raise OtherLayoutError(
            BaseError(
                f"{len(extra)} tensors that a {config.layout.model_type} does not have: {', '.join(sorted(extra)[:3])}",
                where=str(folder),
                remedy="config.json and weights must belong to the same model; check model_type and num_hidden_layers",
            )
        )


def _assemble(
    config: BaseConfig, expected: dict[str, tuple[int, ...]], tensors: dict[str, TensorInfo], *, has_weights: bool
) -> ModelAnatomy:
    layout, sizes = config.layout, config.sizes
    blocks = _blocks(config)
    new = [TensorInfo(name=name, shape=shape, dtype=config.dtype) for name, shape in expected.items() if name not in tensors]
    return ModelAnatomy(
        model_type=layout.model_type,
        kind=layout.kind,
        folder=str(config.path.parent),
        has_weights=has_weights,
        num_blocks=sizes["blocks"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=sizes.get("vocab", 0),
        max_positions=sizes["positions"] - layout.unused_positions,
        tied=config.tied,
        block_prefix=layout.block_prefix,
        blocks_module=layout.blocks_module,
        backbone=layout.backbone,
        head_weight=layout.head_weight,
        head_bias=layout.head_bias,
        classifier_weight=layout.classifier_weight,
        classifier_bias=layout.classifier_bias,
        embeddings=tuple(template.name for template in layout.embeddings),
        final_norm=tuple(template.name for template in present(layout.final_norm, config.flags)),
        blocks=tuple(tuple(block) for block in blocks),
        linears=tuple(tuple(name for name, template in block.items() if template.linear) for block in blocks),
        stacked=tuple(tuple(name for name, template in block.items() if template.stacked) for block in blocks),
        routers=tuple(tuple(name for name, template in block.items() if template.router) for block in blocks),
        attention=layout.attention,
        norm=layout.norm,
        mlp=layout.mlp,
        activation=config.activation,
        experts=config.experts,
        dropout=config.dropout,
        plan_only=config.plan_only,
        tensors=tensors,
        new_tensors=tuple(new),
        config_sha256=content_hash(config.values),
    )
