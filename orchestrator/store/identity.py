"""What tells one base model, and one set of installed packages, from another."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.store.files import read_json, sampled_sha256

PACKAGES = ("orchestrator", "torch", "ray", "deepspeed", "transformers", "peft", "bitsandbytes", "optuna")


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


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers; a package that is not installed is left out."""
    found: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
