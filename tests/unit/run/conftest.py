"""Fixtures that write a run directory with everything in it, or kill a writer at every point."""

from __future__ import annotations

from tests.unit.fake_run import fake_run, make
from tests.unit.store.conftest import killed_everywhere

__all__ = ["fake_run", "killed_everywhere", "make"]
