"""What a base's files hold, in a few lines that tell it from any other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.store.files import read_json, sampled_sha256


def base_identity(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """The base's config, and what its weight files hold; folders and times are left out, for copies are the same base.

    Args:
        files: Names of its weight files.
    """
    weights = {file: file_identity(folder / file) for file in sorted(files)}
    return {"config": read_json(folder / "config.json"), "weights": weights}


def file_identity(path: Path) -> str:
    """Size and a sampled hash of a file; empty where there is none. Cheap for files of any size."""
    try:
        return f"{path.stat().st_size} bytes, {sampled_sha256(path)[:16]}"
    except OSError:
        return ""
