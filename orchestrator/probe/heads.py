"""The names of the output projection of a model, also of one that has none."""

from __future__ import annotations

import copy
from typing import NamedTuple

from orchestrator.probe.classes import CAUSAL, Built, RefusedError, build
from orchestrator.probe.structure import Structure, find_structure


class HeadNames(NamedTuple):
    """The output projection of a model."""

    weight: str = ""
    bias: str = ""
    tied: bool = False
    """True if it shares the tensor of the input embedding."""


def head_names(built: Built, structure: Structure) -> HeadNames:
    """Return the names of the output projection.

    A classifier has none: the base's causal LM says what it is called, so that it is told from a tensor that is unknown.
    """
    if not built.classifies:
        return _names(structure)
    name = CAUSAL.get(built.config.model_type)
    if built.kind != "decoder" or name is None:
        return HeadNames()
    try:
        return _names(find_structure(Built(model=build(copy.deepcopy(built.config), name), config=built.config, kind=built.kind)))
    except RefusedError:
        return HeadNames()


def _names(structure: Structure) -> HeadNames:
    weight = structure.name_of(structure.head, "weight")
    tied = bool(weight) and structure.first_name(weight) != weight
    return HeadNames(weight, structure.name_of(structure.head, "bias"), tied)
