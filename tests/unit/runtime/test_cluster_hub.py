"""A base from the hub on a cluster: every node fetches it once, into its own cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bases import HubBase, locate_base
from orchestrator.errors import BaseError
from orchestrator.runtime import cluster
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec.models import BaseSpec
from orchestrator.store import file_identity
from tests.hub_server import HubServer
from tests.unit.hub.fixtures import TOKEN, hub

__all__ = ["hub"]


@pytest.fixture
def other_home(hub: HubServer, tmp_path: Path) -> Iterator[Path]:
    """The folder with the caches of a second node, which has no token."""
    import ray
    from ray.cluster_utils import Cluster

    home = tmp_path / "other"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        made: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for name, value in hub.environment(home, HF_HUB_OFFLINE="0").items():
            environment.setenv(name, value)
        made.add_node(num_cpus=1)
        with cluster.connected(made.address):
            assert len(ray.nodes()) == 2
            yield home
        made.shutdown()


def fetched(model: str, folder: Path) -> tuple[HubBase, Path, dict[str, str]]:
    base = locate_base(BaseSpec(model=model), folder)
    assert isinstance(base, HubBase)
    here = base.for_training(lambda message: None)
    return base, here, {path.name: file_identity(path) for path in here.iterdir()}


@pytest.mark.ray
def test_every_node_fetches_it_once_and_says_why_it_cannot(
    hub: HubServer, other_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_folder("org/tiny", Path(SAMPLE_BASE))
    base, here, wanted = fetched("org/tiny", tmp_path)
    num_bytes = (here / "model.safetensors").stat().st_size
    sent = hub.bytes_of("model.safetensors")
    cluster.require_base_everywhere(here, wanted, base)
    there = other_home / "hf" / "hub" / "models--org--tiny" / "snapshots" / base.hub.sha
    assert {path.name: file_identity(path) for path in there.iterdir()} == wanted
    assert there != here
    assert hub.bytes_of("model.safetensors") - sent == num_bytes
    hub.requests.clear()
    cluster.require_base_everywhere(here, wanted, base)
    assert hub.requests == []
    with pytest.raises(BaseError, match=r"on [0-9.]+, model\.safetensors differs"):
        cluster.require_base_everywhere(here, wanted | {"model.safetensors": "8 bytes, abc"}, base)

    hub.add_folder("org/gated", Path(SAMPLE_BASE))
    hub.repositories["model", "org/gated"].granted = {TOKEN}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    base, here, wanted = fetched("org/gated", tmp_path)
    with pytest.raises(BaseError, match="the repository is gated, and there is no token") as caught:
        cluster.require_base_everywhere(here, wanted, base)
    assert caught.value.where.startswith("node ")
    assert "`hf download org/gated`" in caught.value.remedy
    assert TOKEN not in str(caught.value)
    assert os.environ["HF_TOKEN"] == TOKEN
