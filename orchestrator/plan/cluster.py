"""Read a file that describes a cluster, to plan for a remote cluster.

nodes:
  - {count: 4, cpus: 96, gpus: 8, gpu: H100-80GB, gpu_memory: 80GiB, memory: 1000GiB, price: 2.5}

`gpu_memory` may be omitted for a GPU in the table of `cost/accelerators.py`; `price` is the price of one GPU for one hour.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import SpecError, UsageError
from orchestrator.plan.cost.accelerators import find_accelerator
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.spec.source import read_source

NODE_KEYS = ("count", "cpus", "gpus", "gpu", "gpu_memory", "memory", "price")
_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = {**_DECIMAL, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MAX_NODES = 100_000
"""Largest `count` of one kind of node; anything larger is taken for a typing error."""
_EXAMPLE = "nodes: [{count: 1, cpus: 96, gpus: 8, gpu: H100-80GB, gpu_memory: 80GiB, memory: 1000GiB}]"


def read_cluster_file(path: str | Path) -> ClusterDescription:
    """Read a cluster file.

    Raises:
        UsageError: the file is missing or not YAML, a key is unknown or missing, a number or size cannot be read;
            the message names the key.
    """
    path = Path(path)
    content = _read_yaml(path)
    nodes = cast("Mapping[str, Any]", content).get("nodes") if isinstance(content, Mapping) else None
    if not isinstance(nodes, list) or not nodes or set(cast("Mapping[str, Any]", content)) != {"nodes"}:
        raise UsageError("not a cluster", where=str(path), expected="one key, `nodes`, with a list of nodes", remedy=_EXAMPLE)
    entries = cast("list[Any]", nodes)
    return ClusterDescription(
        nodes=tuple(_node(entry, f"{path}: nodes[{i}]") for i, entry in enumerate(entries)), source=str(path)
    )


def _read_yaml(path: Path) -> Any:
    """Read the file like a spec, with the same limits on the size that aliases and merges may expand to."""
    try:
        source = read_source(path)
        problems = source.problems
    except SpecError as error:
        source, problems = None, list(error.problems)
    if problems or source is None:
        first = problems[0]
        where = f"{path}:{first.line}:{first.column}" if first.line else str(path)
        hint = f" ({first.hint})" if first.hint and "spec" not in first.hint else ""
        what = f"{first.path}: {first.message}{hint}" if first.path else f"{first.message}{hint}"
        raise UsageError(f"cannot be read: {what}", where=where, expected="a YAML file", remedy=_EXAMPLE)
    return source.data


def parse_size(text: str) -> int:
    """Parse a size: `80GiB` -> 85899345920, `1.5 TB` -> 1500000000000; a bare number is bytes. Raises ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(text)
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _node(entry: Any, where: str) -> NodeDescription:
    if not isinstance(entry, Mapping):
        raise UsageError(f"a node is a mapping, not {entry!r}", where=where, remedy=_EXAMPLE)
    values = cast("Mapping[str, Any]", entry)
    for key in values:
        if key not in NODE_KEYS:
            near = difflib.get_close_matches(str(key), NODE_KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"unknown key {key!r}{hint}", where=where, expected=", ".join(NODE_KEYS), remedy=_EXAMPLE)
    num_gpus = _whole(values, "gpus", where, default=0, least=0)
    named = [key for key in ("gpu", "gpu_memory") if key in values]
    if named and "gpus" not in values:
        raise UsageError(
            f"{named[0]} without gpus", where=where, expected="gpus: how many a node has", remedy=f"add gpus, or drop {named[0]}"
        )
    gpu_name = values.get("gpu", "")
    if not isinstance(gpu_name, str | int) or isinstance(gpu_name, bool):
        raise UsageError(
            f"gpu is {gpu_name!r}", where=f"{where}.gpu", expected="a GPU's name, such as H100-80GB", remedy=_EXAMPLE
        )
    return NodeDescription(
        count=_whole(values, "count", where, default=1, least=1, most=MAX_NODES),
        num_cpus=_whole(values, "cpus", where, default=None, least=1),
        num_gpus=num_gpus,
        gpu_memory_bytes=_gpu_memory(values, where) if num_gpus else 0,
        gpu_name=str(gpu_name),
        gpu_hour_price=_price(values, where),
        memory_bytes=_size(values, "memory", where),
    )


def _gpu_memory(values: Mapping[str, Any], where: str) -> int:
    """Return the file's value, or the table's value for a GPU of that name."""
    if "gpu_memory" in values:
        return _size(values, "gpu_memory", where)
    known = find_accelerator(str(values.get("gpu", "")))
    if known is None or known.memory_bytes is None:
        name = f", and {values['gpu']!r} may have {'any' if known is None else 'more than one'} size" if "gpu" in values else ""
        raise UsageError(
            f"gpus without gpu_memory{name}", where=where, expected="gpu_memory: 80GiB", remedy="give the memory of each GPU"
        )
    return known.memory_bytes


def _price(values: Mapping[str, Any], where: str) -> float | None:
    price = values.get("price")
    if price is None:
        return None
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < math.inf:
        raise UsageError(
            f"price is {price!r}",
            where=f"{where}.price",
            expected="a number above zero: the price of one GPU for one hour",
            remedy=_EXAMPLE,
        )
    return float(price)


def _whole(values: Mapping[str, Any], key: str, where: str, *, default: int | None, least: int, most: float = math.inf) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        found = "is missing" if value is None else f"is {value!r}"
        bounds = f"from {least} up" if most == math.inf else f"from {least} to {most}"
        raise UsageError(f"{key} {found}", where=f"{where}.{key}", expected=f"a whole number {bounds}", remedy=_EXAMPLE)
    return value


def _size(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    try:
        if value is None or isinstance(value, bool):
            raise ValueError
        size = parse_size(str(value))
    except ValueError:
        found = "is missing" if value is None else f"is {value!r}"
        raise UsageError(f"{key} {found}", where=f"{where}.{key}", expected="a size such as 80GiB", remedy=_EXAMPLE) from None
    if size <= 0:
        raise UsageError(f"{key} is {value!r}", where=f"{where}.{key}", expected="a size greater than zero", remedy=_EXAMPLE)
    return size
