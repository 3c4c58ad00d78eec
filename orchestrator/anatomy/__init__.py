"""What the base is: blocks, parameter names, shapes and types; and what a layer policy becomes on it.

    folder = resolve_base("sample", spec_folder)
    anatomy = read_anatomy(folder, need_weights=True)      # config.json and safetensors headers, no weights read
    selection = select(anatomy, "last:2", "lora", 16, task="completion")

`known_layouts()` lists the model types that can be planned with, `trainable_layouts()` those that can be trained; the table
is in `layouts/`, and a new type is a new row there. A type that it does not have is recognised from its tensors' names
(`recognise.py`), to plan with.
"""

from orchestrator.anatomy.layouts import known_layouts, trainable_layouts
from orchestrator.anatomy.reader import read_anatomy, resolve_base
from orchestrator.anatomy.selection import select, select_everything
from orchestrator.anatomy.values import Experts, LayerSelection, ModelAnatomy, TensorInfo
from orchestrator.spec.policy import normal_form

__all__ = [
    "Experts",
    "LayerSelection",
    "ModelAnatomy",
    "TensorInfo",
    "known_layouts",
    "normal_form",
    "read_anatomy",
    "resolve_base",
    "select",
    "select_everything",
    "trainable_layouts",
]
