"""Cluster files: sizes for people, errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.plan import read_cluster_file
from orchestrator.plan.cluster import parse_size
from orchestrator.units import GIB


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_a_cluster_of_two_kinds(tmp_path: Path) -> None:
    text = """
nodes:
  - {count: 4, cpus: 96, gpus: 8, gpu: H100-80GB, gpu_memory: 80GiB, memory: 1000GiB}
  - {cpus: 16, memory: 64 GB}
"""
    cluster = read_cluster_file(write(tmp_path, text))
    assert (cluster.num_gpus, cluster.num_cpus) == (32, 400)
    assert cluster.nodes[0].gpu_memory_bytes == 80 * GIB
    assert cluster.nodes[1].memory_bytes == 64 * 10**9
    assert cluster.source.endswith("cluster.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("1.5 TB", 1_500_000_000_000), ("1024", 1024), ("40gib", 40 * GIB), ("7 B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80 gigs", "-5GiB", "1e3GiB", "80 GiB extra"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: [", "cannot be read"),
        ("[]", "not a cluster"),
        ("nodes: []", "not a cluster"),
        ("nodes: [{cpus: 4, memory: 8GiB}]\nextra: 1", "not a cluster"),
        ("nodes: [4]", "a node is a mapping"),
        ("nodes: [{cpu: 4, memory: 8GiB}]", "did you mean 'cpus'"),
        ("nodes: [{memory: 8GiB}]", r"nodes\[0\].cpus: cpus is missing"),
        ("nodes: [{cpus: 0, memory: 8GiB}]", "cpus is 0"),
        ("nodes: [{cpus: true, memory: 8GiB}]", "cpus is True"),
        ("nodes: [{cpus: 4}]", "memory is missing"),
        ("nodes: [{cpus: 4, memory: lots}]", "memory is 'lots'"),
        ("nodes: [{cpus: 4, memory: 8GiB}, {cpus: 4, memory: 8GiB, gpus: 2}]", r"nodes\[1\]: gpus without gpu_memory"),
        ("nodes: [{cpus: 4, memory: 8GiB, gpus: 1, gpu_memory: 0}]", "gpu_memory is 0"),
        ("nodes: [{cpus: 4, memory: 8GiB, gpus: 2, gpu: A100}]", "'A100' may have more than one size"),
        ("nodes: [{cpus: 4, memory: 8GiB, gpus: 2, gpu: Quantum 9000}]", "'Quantum 9000' may have any size"),
        ("nodes: [{cpus: 4, memory: 8GiB, gpu: H100}]", r"nodes\[0\]: gpu without gpus"),
        ("nodes: [{cpus: 4, memory: 8GiB, gpu_memory: 80GiB}]", "gpu_memory without gpus"),
        ("nodes: [{cpus: 4, memory: 8GiB, gpus: 1, gpu_memory: 80GiB, gpu: null}]", "gpu is None"),
        ("nodes: [{cpus: 4, memory: 8GiB, count: 1000000000}]", "count is 1000000000"),
        ("nodes: [{cpus: 4, memory: 8GiB, price: cheap}]", r"nodes\[0\].price: price is 'cheap'"),
        ("nodes: [{cpus: 4, memory: 8GiB, price: 0}]", "price is 0"),
        ("nodes: [{cpus: 4, memory: 8GiB, price: true}]", "price is True"),
    ],
)
def test_mistakes_name_their_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_cluster_file(write(tmp_path, text))
    assert "cluster.yaml" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_gpu_of_the_table_brings_its_memory(tmp_path: Path) -> None:
    text = "nodes: [{cpus: 4, gpus: 2, gpu: NVIDIA A100-SXM4-40GB, memory: 8GiB, price: 1.5}]"
    (node,) = read_cluster_file(write(tmp_path, text)).nodes
    assert (node.gpu_memory_bytes, node.gpu_hour_price) == (40 * GIB, 1.5)
    (stated,) = read_cluster_file(write(tmp_path, text.replace("memory: 8GiB", "memory: 8GiB, gpu_memory: 39GiB"))).nodes
    assert stated.gpu_memory_bytes == 39 * GIB


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_cluster_file(tmp_path / "nowhere.yaml")
