"""From a base's folder to its anatomy."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.config import BaseConfig, read_config
from orchestrator.anatomy.headers import read_header
from orchestrator.anatomy.layouts import TensorTemplate, axis_size, present
from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.errors import BaseError
from orchestrator.samples import SAMPLE_BASE
from orchestrator.values import content_hash

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TRAINABLE_DTYPES = ("F32", "BF16", "F16")


def resolve_base(model: str, spec_folder: Path) -> Path:
    """The folder of `base.model`: the sample, or a folder relative to the spec's."""
    if model == "sample":
        return Path(SAMPLE_BASE).resolve()
    return (spec_folder / Path(model).expanduser()).resolve()


def read_anatomy(folder: Path | str, *, need_weights: bool) -> ModelAnatomy:
    """Blocks, names, shapes and types of a base, from config.json and safetensors headers alone.

    Without weights beside config.json the tensors are those that the config implies, in its dtype, and
    `has_weights` is False: enough to plan.

    Raises:
        BaseError: see `read_config` and `read_header`; weights missing though needed, pickled, quantized, or
            not what the config implies.
    """
    folder = Path(folder).resolve()
    config = read_config(folder)
    templates = _all_templates(config)
    stored = _read_weights(folder)
    if stored is None and need_weights:
        raise BaseError(
            "the folder has a config but no weights: it can be planned with, not trained",
            where=str(folder),
            expected=f"{SINGLE}, or shards with {INDEX}",
            remedy="put the base's safetensors files there, or point `base.model` at a folder that has them",
        )
    expected = {name: _shape(template, config) for name, template in templates.items()}
    pooler = {template.name for template in config.layout.pooler}
    if stored is None:
        tensors = {name: TensorInfo(name=name, shape=shape, dtype=config.dtype) for name, shape in expected.items()}
    else:
        tensors = _match(folder, config, expected, optional=pooler, stored=stored)
    new = tuple(TensorInfo(name=name, shape=shape, dtype=config.dtype) for name, shape in expected.items() if name not in tensors)
    return _assemble(folder, config, tensors, new, has_weights=stored is not None)


def _blocks(config: BaseConfig) -> list[dict[str, TensorTemplate]]:
    """The tensors of each block by complete name."""
    templates = present(config.layout.block, config.flags)
    prefixes = [config.layout.block_prefix.format(number) for number in range(config.sizes["blocks"])]
    return [{prefix + template.name: template for template in templates} for prefix in prefixes]


def _all_templates(config: BaseConfig) -> dict[str, TensorTemplate]:
    """Every tensor that the config implies, in the order of the forward pass."""
    layout = config.layout
    templates = {template.name: template for template in layout.embeddings}
    for block in _blocks(config):
        templates |= block
    templates |= {template.name: template for template in (*layout.final_norm, *layout.pooler)}
    if layout.kind == "decoder" and not config.tied:
        templates[layout.head_weight] = TensorTemplate(layout.head_weight, ("vocab", "hidden"), linear=True)
    return templates


def _shape(template: TensorTemplate, config: BaseConfig) -> tuple[int, ...]:
    return tuple(axis_size(axis, config.sizes) for axis in template.shape)


def _read_weights(folder: Path) -> dict[str, TensorInfo] | None:
    """Stored tensors by stored name; None when the folder has no weights at all."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise BaseError(
            f"the only weights are pickles ({', '.join(pickles[:3])}), and pickle weights can run code when loaded",
            where=str(folder),
            expected=f"{SINGLE}, or shards with {INDEX}",
            remedy="convert to safetensors in a place where running that code is safe (`save_pretrained` writes safetensors)",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise BaseError(
            f"safetensors files without {INDEX}: {', '.join(others[:3])}",
            where=str(folder),
            expected=f"one {SINGLE}, or shards with {INDEX}",
            remedy=f"copy {INDEX} from the base too",
        )
    return None


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    try:
        weight_map = cast("dict[str, Any]", json.loads(index.read_bytes()))["weight_map"]
        places = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BaseError("no valid index: `weight_map` is missing", where=str(index), remedy="copy the index again") from None
    files = sorted(set(places.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise BaseError(f"a shard outside the folder: {outside[0]}", where=str(index), remedy="copy the index again")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise BaseError(
            f"{len(missing)} of {len(files)} shards missing: {', '.join(missing[:3])}",
            where=str(folder),
            remedy="copy the missing shards into the folder",
        )
    headers = {file: read_header(folder / file) for file in files}
    for name, file in places.items():
        if name not in headers[file]:
            raise BaseError(f"{name} is not in {file}, where the index puts it", where=str(index), remedy="copy the base again")
    return {name: headers[file][name] for name, file in places.items()}


def _match(
    folder: Path,
    config: BaseConfig,
    expected: dict[str, tuple[int, ...]],
    *,
    optional: set[str],
    stored: dict[str, TensorInfo],
) -> dict[str, TensorInfo]:
    """Stored tensors under their parameters' names, after comparing names, shapes and types with the config."""
    prefix = config.layout.backbone + "."
    tensors: dict[str, TensorInfo] = {}
    for name, shape in expected.items():
        bare = name.removeprefix(prefix)
        tensor = stored.get(name) or stored.get(bare)
        if tensor is None:
            continue
        tensors[name] = tensor.model_copy(update={"name": name, "stored_name": "" if tensor.name == name else tensor.name})
        if tensor.shape != shape:
            raise BaseError(
                f"{tensor.name} has shape {list(tensor.shape)} in {tensor.file}",
                where=str(folder),
                expected=f"{list(shape)} by config.json",
                remedy="config.json and weights are of two models; copy both from one place",
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
        hint = " if the head is tied, say `tie_word_embeddings: true` in config.json" if missing == [head] else ""
        raise BaseError(
            f"{len(missing)} tensors missing: {', '.join(missing[:3])}",
            where=str(folder),
            expected=f"the {len(expected)} tensors of a {config.layout.model_type} with {config.sizes['blocks']} blocks",
            remedy=hint.strip() or "copy the base again; config.json and weights must be of one model",
        )
    used = {tensor.stored_name or tensor.name for tensor in tensors.values()}
    tolerated = (*config.layout.ignored, *([head] if config.tied else []))
    extra = [name for name in stored if name not in used and not any(fnmatchcase(name, pattern) for pattern in tolerated)]
    if extra:
        raise BaseError(
            f"{len(extra)} tensors that a {config.layout.model_type} does not have: {', '.join(sorted(extra)[:3])}",
            where=str(folder),
            remedy="config.json and weights must be of one model; check model_type and num_hidden_layers",
        )


def _assemble(
    folder: Path, config: BaseConfig, tensors: dict[str, TensorInfo], new: tuple[TensorInfo, ...], *, has_weights: bool
) -> ModelAnatomy:
    layout, sizes = config.layout, config.sizes
    blocks = _blocks(config)
    return ModelAnatomy(
        model_type=layout.model_type,
        kind=layout.kind,
        folder=str(folder),
        has_weights=has_weights,
        num_blocks=sizes["blocks"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=sizes["vocab"],
        max_positions=sizes["positions"],
        tied=config.tied,
        block_prefix=layout.block_prefix,
        blocks_module=layout.blocks_module,
        backbone=layout.backbone,
        head_weight=layout.head_weight,
        classifier_weight=layout.classifier_weight,
        classifier_bias=layout.classifier_bias or "",
        embeddings=tuple(template.name for template in layout.embeddings),
        final_norm=tuple(template.name for template in layout.final_norm),
        blocks=tuple(tuple(block) for block in blocks),
        linears=tuple(tuple(name for name, template in block.items() if template.linear) for block in blocks),
        tensors=tensors,
        new_tensors=new,
        config_sha256=content_hash(config.values),
    )
