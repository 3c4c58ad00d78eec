"""Anatomy of a base: blocks, parameter names, shapes and types; and the layers that a policy selects.

    folder = resolve_base("sample", spec_folder)
    anatomy = read_anatomy(folder, need_weights=True)      # config.json and safetensors headers, no weights read
    selection = select(anatomy, "last:2", "lora", 16, task="completion")

`known_layouts()` lists the model types of the table in `layouts/`, `trainable_layouts()` those of them that it describes well
enough to train. Everything else is learned from the transformers class (`learned.py`), which a process of its own builds
(`orchestrator.probe`).
"""

from orchestrator.anatomy.layouts import known_layouts, trainable_layouts
from orchestrator.anatomy.pooling import pooled_for, with_pooling
from orchestrator.anatomy.reader import read_anatomy, resolve_base
from orchestrator.anatomy.selection import check_modules, select, select_everything
from orchestrator.anatomy.values import Experts, LayerSelection, ModelAnatomy, Pooling, StoredPart, TensorInfo, Ways
from orchestrator.spec.policy import normal_form

__all__ = [
    "Experts",
    "LayerSelection",
    "ModelAnatomy",
    "Pooling",
    "StoredPart",
    "TensorInfo",
    "Ways",
    "check_modules",
    "known_layouts",
    "normal_form",
    "pooled_for",
    "read_anatomy",
    "resolve_base",
    "select",
    "select_everything",
    "trainable_layouts",
    "with_pooling",
]
