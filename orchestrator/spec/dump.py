"""A spec as YAML text that loads again."""

from __future__ import annotations

from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from orchestrator.spec.models import JobSpec


def resolved_yaml(spec: JobSpec) -> str:
    """Every key with its value, the defaults filled in."""
    yaml: Any = YAML()
    yaml.width = 120
    stream = StringIO()
    yaml.dump(spec.model_dump(mode="json"), stream)
    return stream.getvalue()
