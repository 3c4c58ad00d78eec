"""The known model layouts, as data: to add a layout, add a row.

A row says which tensors a model of one `model_type` has and how their shapes follow from its config.json.
Names and shapes are those of the transformers 5.23 classes `AutoModelForCausalLM` (decoders),
`AutoModelForSequenceClassification` (encoders) and `ViTForImageClassification`; a test builds them and compares.
"""

from orchestrator.anatomy.layouts.encoder import ENCODERS
from orchestrator.anatomy.layouts.gpt import GPT
from orchestrator.anatomy.layouts.llama import DENSE, EXPERTS
from orchestrator.anatomy.layouts.template import DROPOUT_KEYS, Layout, TensorTemplate, axis_size, present

LAYOUTS: dict[str, Layout] = {layout.model_type: layout for layout in (*DENSE, *EXPERTS, *GPT, *ENCODERS)}


def known_layouts() -> tuple[str, ...]:
    """Return the values of `model_type` in config.json that can be planned for."""
    return tuple(sorted(LAYOUTS))


def trainable_layouts() -> tuple[str, ...]:
    """Return the values of `known_layouts` that can be trained too."""
    return tuple(sorted(layout.model_type for layout in LAYOUTS.values() if not layout.plan_only))


__all__ = [
    "DROPOUT_KEYS",
    "LAYOUTS",
    "Layout",
    "TensorTemplate",
    "axis_size",
    "known_layouts",
    "present",
    "trainable_layouts",
]
