"""What an installed package holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.mark.parametrize("package", ["orchestrator", "jobs"])
def test_every_file_beside_the_code_is_packaged(package: str) -> None:
    folder = REPOSITORY / package
    packaged = {path for pattern in SETUPTOOLS["package-data"][package] for path in folder.glob(pattern)}
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert sorted(others - packaged) == []
    assert all(list(folder.glob(pattern)) for pattern in SETUPTOOLS["package-data"][package]), "a pattern matches nothing"
