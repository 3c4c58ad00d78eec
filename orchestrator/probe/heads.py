"""The names of the output projection of a model, also of one that has none."""

from __future__ import annotations

import copy

from orchestrator.probe.classes import CAUSAL, Built, RefusedError, build
from orchestrator.probe.structure import Structure, find_structure


def head_names(built: Built, structure: Structure) -> tuple[str, str]:
    """Return the names of the output projection's weight and bias.

    A classifier has none: the base's causal LM says what it is called, so that it is told from a tensor that is unknown.
    """
    if not built.classifies:
        return structure.name_of(structure.head, "weight"), structure.name_of(structure.head, "bias")
    name = CAUSAL.get(built.config.model_type)
    if built.kind != "decoder" or name is None:
        return "", ""
    try:
        causal = find_structure(Built(model=build(copy.deepcopy(built.config), name), config=built.config, kind=built.kind))
    except RefusedError:
        return "", ""
    return causal.name_of(causal.head, "weight"), causal.name_of(causal.head, "bias")
