"""Find the parts of a model by its modules: the blocks of the text model, its embeddings, the last norm, and the head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from orchestrator.anatomy.learning import Refusal
from orchestrator.probe.classes import Built, Kind, RefusedError

NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")
SECOND_STACK = 0.05
"""Share of the text model's weights that lists of layers other than the blocks may have."""


@dataclass(frozen=True, eq=False)
class Structure:
    """A model in its parts. Names are parameter names of the whole model."""

    model: Any
    kind: Kind
    config: PreTrainedConfig
    """Config of the text model."""
    tower: str
    """The module that holds the text model; empty if that is the whole model."""
    blocks_module: str
    backbone: str
    """The outermost module inside the model that returns the hidden states of the text model."""
    head: nn.Module | None
    """The output projection onto the vocabulary."""
    embedding: nn.Module | None
    """The table of the tokens."""

    @cached_property
    def names(self) -> dict[int, str]:
        """Name of each parameter by its identity; of those that share one tensor, the first."""
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    @cached_property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.blocks_module))

    @cached_property
    def in_blocks(self) -> list[list[str]]:
        """Parameter names of each block. A parameter that several blocks share belongs to the first."""
        return [
            [
                f"{self.blocks_module}.{number}.{name}"
                for name, parameter in block.named_parameters()
                if self._owns(number, name, parameter)
            ]
            for number, block in enumerate(self.blocks)
        ]

    def _owns(self, number: int, name: str, parameter: nn.Parameter) -> bool:
        return self.names[id(parameter)] == f"{self.blocks_module}.{number}.{name}"

    def name_of(self, module: nn.Module | None, parameter: str) -> str:
        """Return the name of a module's parameter where the module is, also if it shares a tensor; empty if there is none."""
        if module is None or getattr(module, parameter, None) is None:
            return ""
        place = next((name for name, other in self.model.named_modules() if other is module), None)
        return "" if place is None else f"{place}.{parameter}"

    def first_name(self, name: str) -> str:
        """Return the first name of the tensor that a parameter has."""
        return self.names[id(self.model.get_parameter(name))] if name else ""


def find_structure(built: Built) -> Structure:
    """Return the parts of a model.

    Raises:
        RefusedError: there is no one list of blocks.
    """
    model: Any = built.model
    tower = _tower(model, built)
    blocks_module = _blocks(model, tower)
    config = built.config.get_text_config(decoder=True) if built.kind != "encoder" else built.config.get_text_config()
    return Structure(
        model=model,
        kind=built.kind,
        config=config,
        tower=tower,
        blocks_module=blocks_module,
        backbone=_backbone(model, tower, blocks_module, built.kind),
        head=_head(model),
        embedding=_embedding(model, tower),
    )


def _tower(model: Any, built: Built) -> str:
    """Return the name of the module with the text model inside, that of the decoder in an encoder-decoder; empty if it is all."""
    if built.kind != "encoder_decoder" and built.config.get_text_config() is built.config:
        return ""
    found: Any = model.get_decoder() if built.kind != "encoder" else model.base_model
    name = next((name for name, module in model.named_modules() if module is found), "")
    return name if name and _lists(found) else ""


def _lists(module: nn.Module) -> dict[str, int]:
    """Return the lists of modules with weights that are in no other numbered list, with their numbers of elements."""
    found: dict[str, int] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not NUMBERED.search(name) and len(child):
            size = sum(parameter.numel() for parameter in child.parameters())
            if size:
                found[name] = size
    return found


def _blocks(model: nn.Module, tower: str) -> str:
    text = model.get_submodule(tower)
    lists = _lists(text)
    if not lists:
        raise _refused(model, "has no list of blocks")
    largest = max(lists, key=lambda name: lists[name])
    others = {name: size for name, size in lists.items() if name != largest}
    if sum(others.values()) > SECOND_STACK * sum(lists.values()):
        named = ", ".join(sorted(others))
        raise _refused(model, f"has its layers in several lists ({largest}, {named}), and a layer policy speaks of one")
    return f"{tower}.{largest}" if tower else largest


def _refused(model: nn.Module, what: str) -> RefusedError:
    return RefusedError(
        Refusal(kind="structure", what=f"transformers' class {type(model).__name__} {what}", remedy="use another base")
    )


def _backbone(model: Any, tower: str, blocks_module: str, kind: Kind) -> str:
    """Return the name of the module whose forward pass gives the hidden states that the head is applied to.

    That is the text model of a wrapper, which needs none of what is around it, and otherwise the child of the model that has the
    blocks. A wrapper's text model may be a causal LM itself (Llama 4): then it is that one's child.
    """
    name = tower if tower and kind == "decoder" else blocks_module.partition(".")[0]
    inner: Any = model.get_submodule(name)
    if getattr(inner, "lm_head", None) is not None:
        child = blocks_module.removeprefix(f"{name}.").partition(".")[0]
        return f"{name}.{child}"
    return name


def _head(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def _embedding(model: Any, tower: str) -> nn.Module | None:
    for place in dict.fromkeys((tower, "")):
        module: Any = model.get_submodule(place)
        try:
            found = module.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, nn.Module) and isinstance(getattr(found, "weight", None), torch.Tensor):
            return found
    return None


def block_kinds(structure: Structure) -> tuple[int, ...]:
    """Return the number of each block's kind: equal names, shapes, modules and attributes that select code make one kind."""
    layer_types = _layer_types(structure)
    selects = [_selects(block) for block in structure.blocks]
    numbering = _numbering(selects)
    kinds: dict[object, int] = {}
    found: list[int] = []
    for block, attributes, layer_type in zip(structure.blocks, selects, layer_types, strict=True):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        modules = tuple((name, type(module).__name__) for name, module in block.named_modules())
        code = tuple((key, value) for key, value in attributes.items() if key not in numbering)
        found.append(kinds.setdefault((shapes, modules, code, layer_type), len(kinds)))
    return tuple(found)


def _layer_types(structure: Structure) -> list[object]:
    found: Any = getattr(structure.config, "layer_types", None)
    count = len(structure.blocks)
    return list(found) if isinstance(found, (list, tuple)) and len(found) == count else [""] * count


def _selects(block: nn.Module) -> dict[str, object]:
    """Return the attributes of a block's modules by which their code may branch."""
    found: dict[str, object] = {}
    for name, module in block.named_modules():
        plain: Mapping[str, object] = vars(module)
        for key, value in plain.items():
            if not key.startswith("_") and key != "training" and isinstance(value, (bool, int, str)):
                found[f"{name}.{key}"] = value
    return found


def _numbering(selects: list[dict[str, object]]) -> set[str]:
    """Return the attributes that number the blocks: those of which every block has another value."""
    keys = {key for attributes in selects for key in attributes}
    return {key for key in keys if len(values := [each[key] for each in selects if key in each]) == len(set(values)) > 1}
