"""What the spec's remedies against forgetting need, and what they cannot be asked for."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.spec.models import Anchor, AnchorSpec, JobSpec, Tune
from orchestrator.spec.source import KeyPath

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
    if spec.task == "classify":
        hint = "leave it out; l2sp holds unfrozen weights without any text"
        yield path, f"a classifier has no output projection by which retention text could be {used}", hint, (("task",), path)
    elif spec.data.retain is None:
        yield path, f"there is no retention text that could be {used}", "give data.retain", (("data", "retain"), path)


def _anchor_mistakes(spec: JobSpec, path: KeyPath, anchor: AnchorSpec) -> Iterator[Mistake]:
    if anchor.kind == "ewc":
        yield from _needs_text(spec, path, "weighed by")
    tunes, judged_by = _tunes(spec, path)
    if anchor.kind == "product" and "lora" not in tunes:
        yield path, "unfrozen weights have no adapter whose product could be held", "write l2sp or ewc", (*judged_by, path)
    if anchor.kind == "product" and spec.resources.zero not in ("auto", 0):
        message = f"adapters lie in parts under ZeRO-{spec.resources.zero}, and their products are of whole ones"
        yield path, message, "leave resources.zero out", (("resources", "zero"), path)
    if anchor.kind != "product" and "full" not in tunes:
        why = (
            "the gradient by A is zero at the start, since B is, and so is its Fisher information"
            if anchor.kind == "ewc"
            else "adapters begin beside the base's weights, which do not move"
        )
        yield path, f"{anchor.kind} holds unfrozen weights; with lora {why}", "write product, or tune: full", (*judged_by, path)


def _tunes(spec: JobSpec, path: KeyPath) -> tuple[set[Tune], tuple[KeyPath, ...]]:
    """The ways of tuning that an anchor at this place is meant for, and where they stand."""
    if path[:2] == ("search", "points") and spec.search is not None:
        number = path[2]
        assert isinstance(number, int)
        return {spec.search.points[number].tune}, ((*path[:3], "tune"),)
    tunes: set[Tune] = set()
    judged_by: list[KeyPath] = []
    if spec.search is not None:
        fixed = spec.search.algorithm == "fixed"
        tunes |= {point.tune for point in spec.search.points} if fixed else set(spec.search.tune)
        judged_by.append(("search", "points") if fixed else ("search", "tune"))
    if spec.finetune is not None and path[0] == "train":
        tunes.add(spec.finetune.tune)
        judged_by.append(("finetune", "tune"))
    return tunes, tuple(judged_by)
