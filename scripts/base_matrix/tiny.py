"""Small checkpoints of a type, and its own shape with few blocks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from orchestrator.probe.classes import MASKED, Built, candidates
from orchestrator.probe.shrink import LAYERS, SHARED, instances
from orchestrator.probe.structure import block_kinds, find_structure
from orchestrator.spec.tasks import TASKS, Task
from orchestrator.train.model.self_test import sharpen
from scripts.base_matrix.published import CHANGES

LARGE_BLOCKS = 4
"""Blocks that are left of a published shape, unless that would leave a kind out."""


def published_config(model_type: str) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **CHANGES.get(model_type, {}))


def make_tiny(model_type: str, folder: Path, task: Task) -> None:
    """Save a small model of the type as it is published: encoders with their head for masked tokens.

    Raises:
        RefusedError: transformers cannot build the class.
        ValueError: no small model of the class runs.
    """
    built = candidates(published_config(model_type), TASKS[task].head.kind)[0]
    reasons: list[str] = []
    for tiny in instances(built, find_structure(built)):
        if tiny.built is None:
            reasons.append(tiny.reason)
            continue
        model = _as_published(tiny.built)
        try:
            sharpen(model)
            with torch.no_grad():
                if built.kind != "encoder_decoder":
                    model(input_ids=torch.arange(3, 15)[None])
        except Exception as error:  # a class that cannot run with these sizes may with larger ones
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if getattr(model, "generation_config", None) is not None:
            # Answers are compared token by token, and no token ends them.
            model.generation_config = transformers.GenerationConfig()
        model.save_pretrained(folder)
        return
    raise ValueError(f"no small model runs: {reasons[:1]}")


def _as_published(built: Built) -> Any:
    name = MASKED.get(built.config.model_type) if built.kind == "encoder" else None
    if name is None:
        return built.model
    config = copy.deepcopy(built.config)
    torch.manual_seed(0)
    return getattr(transformers, name)._from_config(config, dtype=torch.float32).eval()


def write_shape(model_type: str, folder: Path, task: Task) -> None:
    """Write the config of the published shape with few blocks, but some of every kind."""
    config = published_config(model_type)
    built = candidates(config, TASKS[task].head.kind)[0]
    kinds = block_kinds(find_structure(built))
    shown = max(kinds.index(kind) for kind in set(kinds)) + 1
    values = _with_blocks(config.to_dict(), len(kinds), min(len(kinds), max(shown, LARGE_BLOCKS)))
    (folder / "config.json").write_text(json.dumps(values | {"dtype": "bfloat16"}, default=str))


def _with_blocks(values: dict[str, Any], blocks: int, kept: int) -> dict[str, Any]:
    """Return a config with the first of its blocks."""

    def reduced(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _with_blocks(value, blocks, kept)
        if isinstance(value, list):
            if len(value) == blocks:
                return value[:kept]
            numbers = all(isinstance(each, int) and each < blocks for each in value)
            return [each for each in value if each < kept] if "layer" in key and numbers else value
        if key == SHARED and isinstance(value, int):
            return min(value, kept // 2)
        return kept if LAYERS.fullmatch(key) and value == blocks else value

    kept_keys = {str(key): value for key, value in values.items() if not str(key).isdigit() or int(key) < kept}
    return {key: reduced(key, value) for key, value in kept_keys.items()}
