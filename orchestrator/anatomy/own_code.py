"""Code that comes with a base: its files, their hash, and which code this process may run.

Code is approved by the hash of its contents, never by its place: a folder whose code has changed is not approved. Whoever runs
approved code (`orchestrator.bases.own_code`) hashes the very files that it imports.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_approved: set[str] = set()


def code_files(folder: Path) -> tuple[Path, ...]:
    """Return the Python files beside config.json, by name. Code in subfolders is never run."""
    return tuple(sorted(file for file in folder.glob("*.py") if file.is_file()))


def code_sha256(folder: Path) -> str:
    """Return one SHA-256 over the names and contents of these files; empty if there are none."""
    files = code_files(folder)
    if not files:
        return ""
    lines = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def approve(sha256: str) -> None:
    """Let this process run the code with this hash."""
    _approved.add(sha256)


def approved_code(folder: Path) -> str:
    """Return the hash of a folder's code if this process may run it; else an empty string."""
    found = code_sha256(folder) if _approved else ""
    return found if found in _approved else ""
