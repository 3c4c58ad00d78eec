"""Fixtures that write a run directory with everything in it."""

from __future__ import annotations

from tests.unit.fake_run import fake_run, make

__all__ = ["fake_run", "make"]
