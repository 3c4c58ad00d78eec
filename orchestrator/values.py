"""The base class of the values that flow from room to room."""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value with a JSON form; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces. Two equal values give the same text."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_hash(value: object) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
