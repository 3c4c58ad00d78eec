"""What is asked of a live cluster before anything starts there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.runtime import cluster
from orchestrator.units import MIB


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two Ray nodes of one core each on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    with cluster.connected(made.address):
        assert len(ray.nodes()) == 2
        yield
    made.shutdown()


@pytest.mark.ray
def test_every_node_must_see_the_runs_folder(two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.require_shared_storage(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="1 of 1 other nodes do not see the run's folder") as caught:
        cluster.require_shared_storage(Path("/proc/self/cwd"))  # of each process another folder
    assert caught.value.exit_code == 3
    assert "share" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_the_driver_tool_does_not_list_is_an_error_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    describe = cluster._describe_gpu._function  # type: ignore[attr-defined]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A, 81559'\necho 'NVIDIA B, 40960'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert describe() == ("NVIDIA B", 40960 * MIB)
    tool.unlink()
    with pytest.raises(PlanError, match="nvidia-smi lists none"):
        describe()
