"""What a room exports is what one gets, whatever was imported before."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import orchestrator

ROOMS = sorted(module.name for module in pkgutil.iter_modules(orchestrator.__path__) if module.ispkg)
MODULES = {"private_token"}
"""Exported as the modules that they are."""


@pytest.mark.parametrize("name", ROOMS)
def test_no_submodule_has_the_name_of_an_export(name: str) -> None:
    """Importing a submodule makes it an attribute of its package, where it would hide an export that is looked up late."""
    room = importlib.import_module(f"orchestrator.{name}")
    submodules = {module.name for module in pkgutil.iter_modules(room.__path__)}
    assert not set(getattr(room, "__all__", ())) & submodules - MODULES
