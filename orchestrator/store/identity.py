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
    return {
        "config": read_json(folder / "config.json"),
        "weights": {
            file: f"{(folder / file).stat().st_size} bytes, {sampled_sha256(folder / file)[:16]}" for file in sorted(files)
        },
    }
