"""The search's discrete choices: layers x tune x lora_rank, each with its selection and its learning-rate range."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from orchestrator.anatomy import LayerSelection, ModelAnatomy, select
from orchestrator.errors import SelectionError
from orchestrator.plan.values import SearchPlan
from orchestrator.spec import LoadedSpec, learning_rate_range
from orchestrator.spec.models import SearchSpec, Task, Tune

FRESH_HEAD_FACTOR = 10.0
"""A classification head that starts from random numbers, alone, is a linear probe: a convex problem that takes a
rate ten times that of pretrained weights."""


class Choice(NamedTuple):
    """A selection with its learning-rate range."""

    selection: LayerSelection
    rates: tuple[float, float]


def head_rates(search: SearchSpec, task: Task) -> tuple[float, float]:
    """The range for a head that learns alone: that of `full`, tenfold where the head is a new classifier."""
    factor = FRESH_HEAD_FACTOR if task == "classify" else 1.0
    low, high = learning_rate_range(search, "full")
    return low * factor, high * factor


@contextmanager
def told_at(place: str) -> Generator[None]:
    """A policy that does not fit the base is told where the spec writes it."""
    try:
        yield
    except SelectionError as error:
        error.where = place
        raise


def search_choices(loaded: LoadedSpec, anatomy: ModelAnatomy, num_classes: int) -> list[Choice]:
    """Every different selection of `search`, in the order of the spec.

    Policies that come to the same selection (`last:8` and `all` on eight blocks; `head` to classify, with lora or
    full) are one choice: the first. A policy by score is a choice of its own until the blocks are scored.

    Raises:
        SelectionError: a policy that matches nothing.
    """
    spec = loaded.spec
    assert spec.search is not None, "the sweep needs `search`"
    found: dict[tuple[object, ...], Choice] = {}
    for number, tune, lora_rank in _points(spec.search):
        layers = spec.search.layers[number]
        with told_at(loaded.where(f"search.layers[{number}]")):
            selection = select(anatomy, layers, tune, lora_rank, task=spec.task, num_classes=num_classes)
        if tune == "lora" and not selection.adapted:
            selection = select(anatomy, layers, "full", None, task=spec.task, num_classes=num_classes)
        key = (selection.pending, selection.trainable, selection.adapted, selection.lora_rank if selection.adapted else None)
        if key not in found:
            found[key] = Choice(selection, _rates(spec.search, spec.task, selection))
    return list(found.values())


def _points(search: SearchSpec) -> Iterator[tuple[int, Tune, int | None]]:
    """Number of a policy, way of tuning, rank of LoRA."""
    for number in range(len(search.layers)):
        for tune in search.tune:
            for lora_rank in search.lora_rank if tune == "lora" else (None,):
                yield number, tune, lora_rank


def _rates(search: SearchSpec, task: Task, selection: LayerSelection) -> tuple[float, float]:
    only_head = selection.new_classifier and len(selection.trainable) == 1 and not selection.adapted
    return head_rates(search, task) if only_head else learning_rate_range(search, selection.tune)


def grid_points(search: SearchPlan) -> list[tuple[int, float]]:
    """`num_trials` points (option index, learning rate) of a grid over options and log-spaced rates.

    Options take turns. An option's rates halve its log range again and again (1/2, 1/4, 3/4, 1/8, 5/8, ...: van der
    Corput's sequence, evenly spaced at 1, 3, 7, ... rates), so that raising `trials` adds points and moves none.
    """
    points: list[tuple[int, float]] = []
    for number in range(search.num_trials):
        turn, index = divmod(number, len(search.options))
        option = search.options[index]
        low, high = math.log(option.learning_rate_low), math.log(option.learning_rate_high)
        points.append((index, math.exp(low + van_der_corput(turn + 1) * (high - low))))
    return points


def van_der_corput(number: int) -> float:
    value, scale = 0.0, 0.5
    while number:
        value += scale * (number & 1)
        number >>= 1
        scale /= 2
    return value
