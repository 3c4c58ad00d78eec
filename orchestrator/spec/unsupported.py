"""Settings that the spec allows but this version does not support yet, rejected with their place. The README lists the same
rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.spec.models import JobSpec
from orchestrator.spec.source import KeyPath

Found = Iterator[tuple[KeyPath, str]]
"""Places and the values found there."""
STORE_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Unsupported:
    """One row: `title` as the README prints it, `remedy` as the error ends."""

    title: str
    remedy: str
    find: Callable[[JobSpec, Path], Found]
    verdict: str = "not supported yet"


def is_url(path: str) -> bool:
    """Return whether a path names an object store instead of a local file."""
    return STORE_URL.match(path) is not None


def policies_of(spec: JobSpec) -> Iterator[tuple[KeyPath, str]]:
    """Yield every layer policy with its place."""
    if spec.search is not None:
        for number, policy in enumerate(spec.search.layers):
            yield ("search", "layers", number), policy
        for number, point in enumerate(spec.search.points):
            yield ("search", "points", number, "layers"), point.layers
    if spec.finetune is not None:
        yield ("finetune", "layers"), spec.finetune.layers


def data_paths_of(spec: JobSpec) -> Iterator[tuple[KeyPath, str]]:
    """Yield every data path with its place."""
    if isinstance(spec.data.train, str):
        yield ("data", "train"), spec.data.train
    else:
        for number, source in enumerate(spec.data.train):
            yield ("data", "train", number, "path"), source.path
    for name, value in (("eval", spec.data.eval), ("test", spec.data.test), ("retain", spec.data.retain)):
        if isinstance(value, str):
            yield ("data", name), value


def _remote_data(spec: JobSpec, folder: Path) -> Found:
    return ((place, path) for place, path in data_paths_of(spec) if is_url(path))


def _remote_output(spec: JobSpec, folder: Path) -> Found:
    if is_url(spec.output):
        yield ("output",), spec.output


UNSUPPORTED = (
    Unsupported("object-store paths under `data`", "copy the data to a local file and give its path", _remote_data),
    Unsupported("object-store paths as `output`", "give a local or mounted folder", _remote_output),
)
