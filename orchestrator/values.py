"""Base class of the values that pass between packages, and their canonical JSON."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

UNUSUAL = re.compile(r"[^ -~\n]")
"""Characters that may not be printable."""


class Value(BaseModel):
    """A frozen value with a JSON form; unknown keys are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def canonical_json(value: object) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces. Equal values give equal texts."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_hash(value: object) -> str:
    """Return the SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def strict_json(value: object, *, named: bool = False) -> Any:
    """Return a value that strict JSON can represent, for `json.dumps(..., allow_nan=False)`.

    Args:
        value: A `Value`, or a tree of dictionaries and lists.
        named: NaN and infinities become their names as text, which a `Value` reads back as the numbers that they were
            (records on disk); without it they become null (what scripts read).
    """
    if isinstance(value, BaseModel):
        return strict_json(value.model_dump(mode="json"), named=named)
    if isinstance(value, float) and not math.isfinite(value):
        return ("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity") if named else None
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key: strict_json(inner, named=named) for key, inner in items}
    if isinstance(value, list | tuple):
        return [strict_json(inner, named=named) for inner in cast("list[Any]", value)]
    return value


def printable_json(text: str) -> str:
    """Return the same JSON with control characters and unpaired surrogates as escapes, safe for terminals and any file.

    Args:
        text: JSON, in which line feeds stand between values only.
    """
    return UNUSUAL.sub(lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def record_json(value: object, *, indent: int | None = None) -> str:
    """Return the JSON text of a record on disk: strict and printable, NaN and infinities by name."""
    return printable_json(json.dumps(strict_json(value, named=True), indent=indent, ensure_ascii=False, allow_nan=False))
