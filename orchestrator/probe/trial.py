"""Try on a small instance of a class what it allows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from orchestrator.anatomy.values import ModelAnatomy, Ways
from orchestrator.probe.assemble import assemble
from orchestrator.probe.classes import Built, first_line
from orchestrator.probe.heads import head_names
from orchestrator.probe.shrink import instances
from orchestrator.probe.structure import Structure
from orchestrator.spec.tasks import TASKS, Task
from orchestrator.train.model.linear_test import not_linear
from orchestrator.train.model.loss import AS_PROJECTED, LogitMap
from orchestrator.train.model.self_test import measured_logit_map, sharpen, try_ways

CLASSIFY: Task = next(task for task, traits in TASKS.items() if traits.head.is_new)
GENERATE: Task = next(task for task, traits in TASKS.items() if not traits.head.is_new)


class Trial(NamedTuple):
    """What was seen of a class."""

    ways: Ways
    logits: LogitMap = AS_PROJECTED
    """What it does to the result of its output projection."""
    order: tuple[str, ...] = ()
    """Names within a block of the modules that multiply, in the order in which they are computed."""
    odd: frozenset[str] = frozenset()
    """Names within a block of linear layers that are no product with their weight, or whose class reads the weight itself: they
    take no adapter and are not quantized."""

    def told(self, anatomy: ModelAnatomy) -> ModelAnatomy:
        """Return the anatomy of the class with what was seen."""
        place = {name: number for number, name in enumerate(self.order)}
        linears = tuple(
            tuple(
                sorted(
                    (name for name in block if _in_block(anatomy, number, name) not in self.odd),
                    key=lambda name, number=number: place.get(_in_block(anatomy, number, name), len(place)),
                )
            )
            for number, block in enumerate(anatomy.linears)
        )
        return with_logits(anatomy, self.logits).model_copy(update={"ways": self.ways, "linears": linears})


def tried(built: Built, structure: Structure) -> Trial:
    """Try a class on a small instance.

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
    return Trial(_nothing_assumed(f"no small instance of {type(built.model).__name__} runs: {reasons[0]}"))


def _try(built: Built, structure: Structure) -> Trial:
    with torch.no_grad():
        sharpen(built.model)
    anatomy = assemble(built, structure, None, head_names(built, structure))
    logits, task = AS_PROJECTED, CLASSIFY
    with _order_of(structure) as order:
        if built.kind == "encoder_decoder":  # its own logits are computed: nothing follows them
            task = GENERATE
        elif not built.classifies:
            logits, task = measured_logit_map(built.model, anatomy), GENERATE
        ways = try_ways(built.model, with_logits(anatomy, logits), task)
    unlike = not_linear(built.model, anatomy, task)
    odd = {_in_block(anatomy, number, name) for number, block in enumerate(anatomy.linears) for name in block if name in unlike}
    return Trial(ways, logits, tuple(order), frozenset(odd))


def _in_block(anatomy: ModelAnatomy, number: int, name: str) -> str:
    """Return the name within its block of the module that has a weight."""
    return name.removeprefix(anatomy.block_prefix.format(number)).removesuffix(".weight")


@contextmanager
def _order_of(structure: Structure) -> Generator[dict[str, None]]:
    """Collect the names within a block of the modules that multiply, as they are called in this context."""
    order: dict[str, None] = {}
    with ExitStack() as stack:
        for block in structure.blocks:
            for name, module in block.named_modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    stack.callback(module.register_forward_hook(partial(_called, order, name)).remove)
        yield order


def _called(order: dict[str, None], name: str, *_: object) -> None:
    order[name] = None


def with_logits(anatomy: ModelAnatomy, logits: LogitMap) -> ModelAnatomy:
    return anatomy.model_copy(update={"logit_scale": logits.scale, "logit_cap": logits.cap})


def _nothing_assumed(reason: str) -> Ways:
    fields = ("packs", "pads", "projects", "injects", "attention")
    return Ways(packs=False, pads=False, projects=False, injects=False, attention="eager", reasons=dict.fromkeys(fields, reason))
