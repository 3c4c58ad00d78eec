"""Joining the cluster, at the moment when it is known that there is work for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from orchestrator.plan.values import ClusterDescription
from orchestrator.runtime.cluster import connected, probe_cluster, require_shared_storage
from orchestrator.runtime.guarding import guarded


def joins(stack: ExitStack, address: str | None, folder: Path) -> Callable[[], ClusterDescription]:
    """Connects to Ray when it is called, until `stack` ends, and describes the cluster.

    Args:
        folder: The run's; every node must see it.
    """

    def cluster() -> ClusterDescription:
        stack.enter_context(connected(address))
        stack.enter_context(guarded(folder))
        require_shared_storage(folder)
        return probe_cluster()

    return cluster
