"""What is asked of a live cluster before anything starts there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bases import FolderBase
from orchestrator.errors import BaseError, PlanError
from orchestrator.runtime import cluster
from orchestrator.units import MIB


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Two Ray nodes of one core each on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
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
    with pytest.raises(PlanError, match="1 of 1 other nodes cannot see the run's folder") as caught:
        cluster.require_shared_storage(Path("/proc/self/cwd"))  # of each process another folder
    assert caught.value.exit_code == 3
    assert "share" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_every_node_must_have_the_base(two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    base = FolderBase(tmp_path)
    wanted = {"model.safetensors": cluster.file_identity(tmp_path / "model.safetensors")}
    assert wanted["model.safetensors"].startswith("7 bytes, ")
    cluster.require_base_everywhere(tmp_path, wanted, base)
    with pytest.raises(BaseError, match=r"on [0-9.]+, model\.safetensors differs") as caught:
        cluster.require_base_everywhere(tmp_path, {"model.safetensors": "8 bytes, abc"}, base)
    assert caught.value.exit_code == 2
    assert caught.value.where == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseError, match=r"model\.safetensors is missing"):
        cluster.require_base_everywhere(Path("/proc/self/cwd"), wanted, base)  # of each process another folder


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
