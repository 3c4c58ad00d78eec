"""Clusters of unlike nodes: the poorest are left out where they would hold the others back."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import PlanError
from orchestrator.plan import make_plan
from orchestrator.plan.values import ClusterDescription, NodeDescription, RunPlan
from orchestrator.units import GIB

H100 = NodeDescription(num_cpus=96, num_gpus=8, gpu_memory_bytes=80 * GIB, gpu_name="H100-80GB", memory_bytes=1000 * GIB)
T4 = NodeDescription(num_cpus=16, num_gpus=1, gpu_memory_bytes=15 * GIB, gpu_name="T4", memory_bytes=60 * GIB)


@pytest.fixture
def plan(base: Any, job: Any, data: Any) -> Any:
    def build(*nodes: NodeDescription, **sections: Any) -> RunPlan:
        cluster = ClusterDescription(nodes=nodes, source="test")
        return make_plan(job(**sections), base("8b"), data(), cluster, job="sweep", spec_sha256="0" * 64)

    return build


@pytest.mark.parametrize("most", [None, 8])
def test_one_small_gpu_does_not_make_a_job_dearer(plan: Any, most: int | None) -> None:
    sections: dict[str, Any] = {"resources": {"max_gpus": most}, "search": {"layers": ["last:2"], "tune": ["lora"]}}
    alone, mixed = plan(H100, **sections), plan(H100, T4, **sections)
    assert mixed.execution == alone.execution
    assert mixed.cost.gpu_hours == alone.cost.gpu_hours
    assert [warning for warning in mixed.warnings if "without the smaller nodes (1 x 1 x T4)" in warning]
    assert not [warning for warning in alone.warnings if "smaller nodes" in warning]


def test_one_small_gpu_does_not_make_a_job_infeasible(plan: Any) -> None:
    sections: dict[str, Any] = {"resources": {"offload": "none"}, "search": {"layers": ["all"], "tune": ["full"]}}
    assert plan(H100, T4, **sections).execution == plan(H100, **sections).execution


def test_a_node_with_little_host_memory_is_left_out_too(plan: Any) -> None:
    poor = H100.model_copy(update={"memory_bytes": 16 * GIB})
    search = {"layers": ["all"], "tune": ["full"]}
    assert plan(H100, poor, search=search).execution == plan(H100, search=search).execution


def test_like_nodes_are_all_used(plan: Any) -> None:
    other = H100.model_copy(update={"memory_bytes": 2000 * GIB})
    found = plan(H100, other, search={"layers": ["last:2"], "trials": 16})
    assert found.num_gangs == 16


def test_a_shortage_names_the_node(plan: Any) -> None:
    small = [T4, T4.model_copy(update={"gpu_memory_bytes": 6 * GIB, "gpu_name": "P4"})]
    with pytest.raises(PlanError, match=r"of 6.0 GiB per rank on a node of 1 x P4, mostly"):
        plan(*small, search={"layers": ["all"], "tune": ["full"]}, resources={"offload": "none"})


def test_offloading_is_said_not_to_be_in_the_hours(plan: Any) -> None:
    search = {"layers": ["all"], "tune": ["full"]}
    (told,) = [note for note in plan(H100, search=search, resources={"max_gpus": 1}).notes if "offload" in note]
    assert told == "offload: parameters: the hours leave out transfers between host and GPU" or "optimizer" in told
    assert not [note for note in plan(H100, search={"layers": ["last:1"]}).notes if "offload" in note]
