"""A Ray for the tests of one module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import orchestrator.runtime  # noqa: F401 - before a test imports ray: the private Ray asks for a token, as for users


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A private Ray that the jobs of this process use and leave standing: each saves its own start."""
    from orchestrator.runtime.cluster import connected

    with connected():
        yield
