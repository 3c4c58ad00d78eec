"""Try on a small instance of a class what it allows."""

from __future__ import annotations

import torch

from orchestrator.anatomy.values import ModelAnatomy, Ways
from orchestrator.probe.assemble import assemble
from orchestrator.probe.classes import Built, first_line
from orchestrator.probe.heads import head_names
from orchestrator.probe.shrink import Tiny, instances
from orchestrator.probe.structure import Structure
from orchestrator.spec.tasks import TASKS, Task
from orchestrator.train.model.loss import AS_PROJECTED, LogitMap
from orchestrator.train.model.self_test import measured_logit_map, sharpen, try_ways

CLASSIFY: Task = next(task for task, traits in TASKS.items() if traits.head.is_new)
GENERATE: Task = next(task for task, traits in TASKS.items() if not traits.head.is_new)


def tried(built: Built, structure: Structure) -> tuple[Ways, LogitMap]:
    """Return the ways of a class and what it does to the result of its output projection.

    Where no instance is small enough or runs, nothing is assumed: rows of one document, the class's own logits and attention.
    """
    reasons: list[str] = []
    for tiny in instances(built, structure):
        try:
            if tiny.built is not None and tiny.structure is not None:
                return _try(tiny.built, tiny.structure)
        except Exception as error:  # a class that cannot run with these sizes may with larger ones
            reasons.append(first_line(error))
        reasons += [tiny.reason] if tiny.reason else []
    return _nothing_assumed(f"no small instance of {type(built.model).__name__} runs: {reasons[0]}"), AS_PROJECTED


def _try(built: Built, structure: Structure) -> tuple[Ways, LogitMap]:
    with torch.no_grad():
        sharpen(built.model)
    anatomy = assemble(built, structure, None, head_names(built, structure))
    if built.classifies:
        return try_ways(built.model, anatomy, CLASSIFY), AS_PROJECTED
    logits = measured_logit_map(built.model, anatomy)
    return try_ways(built.model, with_logits(anatomy, logits), GENERATE), logits


def with_logits(anatomy: ModelAnatomy, logits: LogitMap) -> ModelAnatomy:
    return anatomy.model_copy(update={"logit_scale": logits.scale, "logit_cap": logits.cap})


def _nothing_assumed(reason: str) -> Ways:
    fields = ("packs", "pads", "projects", "injects", "attention")
    return Ways(
        packs=False, pads=False, projects=False, injects=False, attention="eager", reasons=dict.fromkeys(fields, reason)
    )
