"""The search's discrete choices: layers x tuning method x adapters, each with its selection and its range of learning rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from orchestrator.anatomy import LayerSelection, ModelAnatomy, check_modules, select
from orchestrator.errors import SelectionError
from orchestrator.plan.remedies import effective, remedies_of_point, searched_remedies
from orchestrator.plan.values import PlannedPoint, SearchPlan
from orchestrator.spec import LoadedSpec, learning_rate_range
from orchestrator.spec.adapters import PLAIN_LORA, AdapterName, AdapterOptions, Modules
from orchestrator.spec.models import FinetuneSpec, JobSpec, SearchPoint, SearchSpec, Task, TrainSpec, Tune
from orchestrator.spec.tasks import TASKS
from orchestrator.work.remedies import NOTHING, Remedies

FRESH_HEAD_FACTOR = 10.0
"""Factor on the learning rate of a randomly initialised classification head if nothing else is trained: this is a linear probe, a
convex problem that takes a rate ten times that of pretrained weights."""


DEFAULT_LORA_RANK = 16
"""LoRA rank of a fixed point that gives none, the same as a search's default."""
_Key = tuple[object, ...]


class Choice(NamedTuple):
    """A selection with its learning-rate range."""

    selection: LayerSelection
    rates: tuple[float, float]
    remedies: Remedies = NOTHING


class _Asked(NamedTuple):
    """A combination as the spec gives it, with its place in the spec; for a fixed point also its rate."""

    place: str
    layers: str
    tune: Tune
    lora_rank: int | None
    adapter: AdapterOptions
    remedies: Remedies
    rate: float | None = None


def head_rates(search: SearchSpec, task: Task) -> tuple[float, float]:
    """Return the range for a head if nothing else is trained: that of `full`, times ten if the head is a new classifier."""
    factor = FRESH_HEAD_FACTOR if TASKS[task].head.is_new else 1.0
    low, high = learning_rate_range(search, "full")
    return low * factor, high * factor


@contextmanager
def located_at(place: str) -> Generator[None]:
    """Give a selection error the place in the spec that names the policy."""
    try:
        yield
    except SelectionError as error:
        error.where = place
        raise


def search_choices(loaded: LoadedSpec, anatomy: ModelAnatomy, num_classes: int) -> list[Choice]:
    """Return every distinct selection of `search`, in the order of the spec.

    Policies that give the same selection (`last:8` and `all` on eight blocks; `head` for `classify`, with lora or full) are one
    choice, the first of them. A policy by score is a choice of its own until the blocks are scored. Each selection is tried with
    every combination of remedies that fits its tuning method and has an effect on what it trains.

    Raises:
        SelectionError: a policy matches nothing.
    """
    spec = loaded.spec
    assert spec.search is not None, "the sweep needs `search`"
    found: dict[_Key, Choice] = {}
    for place, modules in _modules(spec.search):
        with located_at(loaded.where(place)):
            check_modules(anatomy, modules)
    for asked in _asked(spec.search, spec.train):
        with located_at(loaded.where(asked.place)):
            selection = _selection(asked, anatomy, spec.task, num_classes)
        remedies = effective(anatomy, selection, asked.remedies)
        rates = (asked.rate, asked.rate) if asked.rate is not None else _rates(spec.search, spec.task, selection)
        key = _key(selection, remedies)
        # Points of a fixed list may have the same selection at different rates: the range of their choice covers them all.
        known = found.get(key, Choice(selection, rates, remedies))
        wider = (min(rates[0], known.rates[0]), max(rates[1], known.rates[1]))
        found[key] = known._replace(rates=wider if asked.rate is not None else known.rates)
    return list(found.values())


def planned_points(spec: JobSpec, anatomy: ModelAnatomy, num_classes: int) -> tuple[PlannedPoint, ...]:
    """Return the spec's fixed points, each with the index of its choice in `search_choices`."""
    assert spec.search is not None, "the sweep needs `search`"
    numbers: dict[_Key, int] = {}
    points: list[PlannedPoint] = []
    for asked in _asked(spec.search, spec.train):
        if asked.rate is not None:
            selection = _selection(asked, anatomy, spec.task, num_classes)
            remedies = effective(anatomy, selection, asked.remedies)
            number = numbers.setdefault(_key(selection, remedies), len(numbers))
            points.append(PlannedPoint(option=number, learning_rate=asked.rate))
    return tuple(points)


def _asked(search: SearchSpec, train: TrainSpec) -> Iterator[_Asked]:
    """Yield every combination of policy, tuning method, LoRA rank and remedies; for a fixed list every point."""
    if search.algorithm == "fixed":
        for number, point in enumerate(search.points):
            lora_rank = (point.lora_rank or DEFAULT_LORA_RANK) if point.tune == "lora" else None
            remedies = remedies_of_point(point, train)
            place, adapter = f"search.points[{number}].layers", adapter_asked(point)
            yield _Asked(place, point.layers, point.tune, lora_rank, adapter, remedies, point.learning_rate)
        return
    for number, layers in enumerate(search.layers):
        for tune in search.tune:
            for lora_rank, adapter in searched_adapters(search) if tune == "lora" else ((None, PLAIN_LORA),):
                for remedies in searched_remedies(search, train, tune):
                    yield _Asked(f"search.layers[{number}]", layers, tune, lora_rank, adapter, remedies)


def searched_adapters(search: SearchSpec) -> list[tuple[int, AdapterOptions]]:
    """Return every combination of rank and options of adapters that the search tries."""
    alphas = search.lora_alpha or (None,)
    combined = itertools.product(search.lora_rank, search.adapter, alphas, search.lora_dropout, search.modules)
    return [
        (lora_rank, _options(lora_rank, kind, alpha, dropout, modules)) for lora_rank, kind, alpha, dropout, modules in combined
    ]


def adapter_asked(section: SearchPoint | FinetuneSpec) -> AdapterOptions:
    """Return the adapters of one trial that the spec describes itself."""
    if section.tune != "lora":
        return PLAIN_LORA
    lora_rank = section.lora_rank or DEFAULT_LORA_RANK
    return _options(lora_rank, section.adapter, section.lora_alpha, section.lora_dropout, section.modules)


def _options(lora_rank: int, kind: AdapterName, alpha: int | None, dropout: float, modules: Modules) -> AdapterOptions:
    """Return the options; an alpha of twice the rank is the default, so that equal trials are one choice."""
    return AdapterOptions(kind=kind, alpha=None if alpha == 2 * lora_rank else alpha, dropout=dropout, modules=modules)


def _modules(search: SearchSpec) -> Iterator[tuple[str, Modules]]:
    """Yield every choice of modules with its place in the spec."""
    if search.algorithm == "fixed":
        for number, point in enumerate(search.points):
            yield f"search.points[{number}].modules", point.modules
        return
    for number, modules in enumerate(search.modules):
        yield f"search.modules[{number}]", modules


def _selection(asked: _Asked, anatomy: ModelAnatomy, task: Task, num_classes: int) -> LayerSelection:
    """Return what is trained. LoRA with nothing to adapt (only a new classifier) becomes `full`."""
    selection = select(
        anatomy, asked.layers, asked.tune, asked.lora_rank, adapter=asked.adapter, task=task, num_classes=num_classes
    )
    if asked.tune == "lora" and not selection.adapted:
        # A new classifier is trained whole under `lora` too, so without adapters the two tuning methods are the same trial.
        return select(anatomy, asked.layers, "full", None, task=task, num_classes=num_classes)
    return selection


def _key(selection: LayerSelection, remedies: Remedies) -> _Key:
    """Return a key that is equal for equivalent choices."""
    # The names of modules that were asked for do not matter where others choose the same layers.
    options = selection.adapter.model_copy(update={"modules": "all"})
    adapters = (selection.lora_rank, options) if selection.adapted else None
    return selection.pending, selection.trainable, selection.adapted, adapters, remedies


def _rates(search: SearchSpec, task: Task, selection: LayerSelection) -> tuple[float, float]:
    only_head = selection.new_classifier and len(selection.trainable) == 1 and not selection.adapted
    return head_rates(search, task) if only_head else learning_rate_range(search, selection.tune)


def grid_points(search: SearchPlan) -> list[tuple[int, float]]:
    """Return `num_trials` points (option index, learning rate) of a grid over options and log-spaced rates.

    Options take turns. The rates of an option bisect its log range again and again (1/2, 1/4, 3/4, 1/8, 5/8, ...: the van der
    Corput sequence, evenly spaced at 1, 3, 7, ... rates), so that raising `trials` adds points without moving any.
    """
    points: list[tuple[int, float]] = []
    for number in range(search.num_trials):
        turn, index = divmod(number, len(search.options))
        option = search.options[index]
        low, high = math.log(option.learning_rate_low), math.log(option.learning_rate_high)
        points.append((index, math.exp(low + van_der_corput(turn + 1) * (high - low))))
    return points


def van_der_corput(number: int) -> float:
    """Return the element of the base-2 van der Corput sequence with this number: its binary digits mirrored at the point."""
    value, scale = 0.0, 0.5
    while number:
        value += scale * (number & 1)
        number >>= 1
        scale /= 2
    return value
