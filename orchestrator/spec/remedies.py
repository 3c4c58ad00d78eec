"""What the spec's remedies against forgetting need, and what they cannot be asked for."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.spec.models import Anchor, AnchorSpec, JobSpec, Tune
from orchestrator.spec.source import KeyPath, spell_path

Mistake = tuple[KeyPath, str, str, tuple[KeyPath, ...]]
"""Path, message, hint, and the places that it was judged by."""


def remedy_mistakes(spec: JobSpec) -> Iterator[Mistake]:
    """Replay without text to replay, anchors that fit no way of tuning, and what the task or the engine does not have."""
    for path, share in _replays(spec):
        if share:
            yield from _needs_text(spec, path, "replayed")
    for path, anchor in _anchors(spec):
        if isinstance(anchor, AnchorSpec) and anchor.strength:
            yield from _anchor_mistakes(spec, path, anchor)


def _replays(spec: JobSpec) -> Iterator[tuple[KeyPath, float]]:
    yield ("train", "replay"), spec.train.replay
    if spec.search is not None:
        for number, share in enumerate(spec.search.replay):
            yield ("search", "replay", number), share
        for number, point in enumerate(spec.search.points):
            if point.replay is not None:
                yield ("search", "points", number, "replay"), point.replay


def _anchors(spec: JobSpec) -> Iterator[tuple[KeyPath, Anchor]]:
    yield ("train", "anchor"), spec.train.anchor
    if spec.search is not None:
        for number, anchor in enumerate(spec.search.anchor):
            yield ("search", "anchor", number), anchor
        for number, point in enumerate(spec.search.points):
            if point.anchor is not None:
                yield ("search", "points", number, "anchor"), point.anchor


def _needs_text(spec: JobSpec, path: KeyPath, used: str) -> Iterator[Mistake]:
    if not spec.traits.head.scores_retention:
        hint = "remove it; l2sp needs no retention text"
        yield path, f"a classifier has no output projection with which retention text could be {used}", hint, (("task",), path)
    elif spec.data.retain is None:
        yield path, f"there is no retention text to be {used}", "give data.retain", (("data", "retain"), path)


def _anchor_mistakes(spec: JobSpec, path: KeyPath, anchor: AnchorSpec) -> Iterator[Mistake]:
    if anchor.traits.uses_fisher:
        yield from _needs_text(spec, path, "weighed by")
    if anchor.traits.whole_adapters:
        yield from _needs_whole_adapters(spec, path, anchor)
    judged = _tunes(spec, path)
    misfits = tuple(place for tunes, place in judged if anchor.traits.tune not in tunes)
    if misfits:
        hint = anchor.traits.instead + (_elsewhere(spec, misfits[0]) if len(misfits) < len(judged) else "")
        message = anchor.traits.misfit.format(where=" and ".join(map(spell_path, misfits)))
        yield path, message, hint, (*misfits, path)


def _needs_whole_adapters(spec: JobSpec, path: KeyPath, anchor: AnchorSpec) -> Iterator[Mistake]:
    """Any ZeRO stage that is given is DeepSpeed's, 0 too, and whatever is offloaded is at stage 3."""
    for key, asked in (("zero", spec.resources.zero), ("offload", spec.resources.offload)):
        if asked not in ("auto", "none"):
            message = f"resources.{key}: {asked} requires DeepSpeed, which the anchor `{anchor.kind}` does not support"
            yield path, message, f"remove resources.{key}", (("resources", key), path)


def _tunes(spec: JobSpec, path: KeyPath) -> list[tuple[set[Tune], KeyPath]]:
    """The ways of tuning that an anchor at this place is meant for, and where they stand: one of `train` for those of each
    section, but for trials that have anchors of their own."""
    search, of_train = spec.search, path[0] == "train"
    found: list[tuple[set[Tune], KeyPath]] = []
    if search is not None and path[:2] == ("search", "points"):
        number = path[2]
        assert isinstance(number, int)
        found.append(({search.points[number].tune}, (*path[:3], "tune")))
    elif search is not None and search.algorithm == "fixed":
        tunes: set[Tune] = {point.tune for point in search.points if point.anchor is None or not of_train}
        found += [(tunes, ("search", "points"))] if tunes else []
    elif search is not None and not (of_train and search.anchor):
        found.append((set(search.tune), ("search", "tune")))
    if spec.finetune is not None and of_train:
        found.append(({spec.finetune.tune}, ("finetune", "tune")))
    return found


def _elsewhere(spec: JobSpec, misfit: KeyPath) -> str:
    """What else is to be done about an anchor of `train` that fits one of two sections."""
    place = "search.points" if spec.search is not None and spec.search.algorithm == "fixed" else "search.anchor"
    return f", or move it to {place}" if misfit[0] == "finetune" else f", or override it with {place}"
