"""Fingerprints of a base model and of the installed packages."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.store.files import read_json, sampled_sha256

PACKAGES = ("orchestrator", "torch", "ray", "deepspeed", "transformers", "peft", "bitsandbytes", "optuna")


def base_identity(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """Return a fingerprint of the base's config and weight files; folders and times do not count, so a copy is the same base.

    Args:
        files: Names of its weight files.
    """
    weights = {file: file_identity(folder / file) for file in sorted(files)}
    return {"config": read_json(folder / "config.json"), "weights": weights}


def file_identity(path: Path) -> str:
    """Return size and sampled hash of a file; empty if it does not exist. Cheap for files of any size."""
    try:
        return f"{path.stat().st_size} bytes, {sampled_sha256(path)[:16]}"
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a run's numbers, as far as they are installed."""
    found: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
