"""What holds of every plan, whatever the base, the cluster and the job."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.data import build_set, micro_batches, pack_rows
from orchestrator.errors import BaseError, PlanError
from orchestrator.plan import make_plan
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import Footprint, make_footprint
from orchestrator.plan.placement import num_slots
from orchestrator.plan.values import ClusterDescription, NodeDescription, RunPlan
from orchestrator.units import GIB
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.memory_ladder import MemoryLadder, SmallerExecution

SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def anatomies(draw: st.DrawFn) -> ModelAnatomy:
    """Any base from a thousandth of a billion to some hundred billion parameters, of four layouts."""
    heads = 2 ** draw(st.integers(2, 6))
    config: dict[str, Any] = {
        "model_type": draw(st.sampled_from(["llama", "qwen2", "gpt_neox", "mixtral"])),
        "hidden_size": heads * draw(st.sampled_from([32, 64, 128])),
        "intermediate_size": 64 * draw(st.integers(4, 512)),
        "num_attention_heads": heads,
        "num_key_value_heads": 2 ** draw(st.integers(0, 2)),
        "num_hidden_layers": draw(st.integers(4, 96)),
        "vocab_size": draw(st.integers(256, 256_000)),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": draw(st.booleans()),
        "num_local_experts": 2 ** draw(st.integers(1, 4)),
        "num_experts_per_tok": draw(st.integers(1, 2)),
        "dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_anatomy(folder, need_weights=False)


def node(count: int, each: int, gpu_gib: float, host_gib: int) -> NodeDescription:
    """Its GPU's name says its sizes, so that a placement tells which nodes it is on."""
    return NodeDescription(
        count=count,
        num_cpus=96,
        num_gpus=each,
        gpu_memory_bytes=round(gpu_gib * GIB),
        memory_bytes=host_gib * GIB,
        gpu_name=f"H100 {gpu_gib} {host_gib}",
    )


@st.composite
def clusters(draw: st.DrawFn) -> ClusterDescription:
    """Of GPUs, or in one case of five of cores alone."""
    if not draw(st.integers(0, 4)):
        node_of_cores = st.builds(
            lambda count, cpus, gib: NodeDescription(count=count, num_cpus=cpus, memory_bytes=gib * GIB),
            st.integers(1, 3),
            st.integers(1, 16),
            st.sampled_from([2, 8, 64, 512]),
        )
        return ClusterDescription(
            nodes=tuple(draw(st.lists(node_of_cores, min_size=1, max_size=2, unique_by=lambda kind: kind.num_cpus))),
            source="test",
        )
    gpu_gib, host_gib = st.sampled_from([2, 4, 6, 8, 12, 16, 24, 40, 80]), st.sampled_from([16, 64, 512, 2000])
    kinds = st.builds(node, st.integers(1, 4), st.integers(1, 8), gpu_gib, host_gib)
    return ClusterDescription(nodes=tuple(draw(st.lists(kinds, min_size=1, max_size=3))), source="test")


def richer(cluster: ClusterDescription, factor: float) -> ClusterDescription:
    return cluster.model_copy(
        update={
            "nodes": tuple(
                kind.model_copy(
                    update={
                        "gpu_memory_bytes": round(kind.gpu_memory_bytes * factor),
                        "memory_bytes": round(kind.memory_bytes * factor),
                    }
                )
                for kind in cluster.nodes
            )
        }
    )


SECTIONS = st.fixed_dictionaries(
    {
        "search": st.fixed_dictionaries(
            {
                "layers": st.sampled_from([["last:2"], ["all"], ["head", "last:4", "all"]]),
                "tune": st.sampled_from([["lora"], ["full"], ["lora", "full"]]),
            }
        ),
        "train": st.fixed_dictionaries({"tokens_per_step": st.sampled_from([1000, 8192, 131072])}),
        "data": st.fixed_dictionaries({"max_tokens": st.sampled_from([64, 512, 4096])}),
        "quantize": st.sampled_from(["none", "none", "nf4"]),
        "finetune": st.fixed_dictionaries(
            {"layers": st.sampled_from(["last:2", "all"]), "tune": st.sampled_from(["lora", "full"])}
        ),
    }
)
RESOURCES = st.fixed_dictionaries(
    {},
    optional={
        "max_gpus": st.integers(1, 32),
        "gangs": st.integers(1, 4),
        "ranks_per_gang": st.integers(1, 8),
        "zero": st.sampled_from([0, 1, 2, 3]),
        "offload": st.sampled_from(["none", "optimizer", "parameters"]),
    },
)
JOBS = st.sampled_from(["sweep", "finetune"])


def plan_or_none(loaded: Any, anatomy: ModelAnatomy, size: Any, on: ClusterDescription, kind: Any) -> RunPlan | None:
    try:
        return make_plan(loaded, anatomy, size, on, job=kind, spec_sha256="0" * 64)
    except (PlanError, BaseError):
        return None


def used_nodes(found: RunPlan, cluster: ClusterDescription) -> list[NodeDescription]:
    """Those that the plan is for: kinds may differ in their number of GPUs alone."""
    assert found.placement is not None
    names = {kind.node for kind in found.placement.nodes}
    on_gpus = found.execution.device == "cuda"
    return [
        kind
        for kind in cluster.nodes
        if (f"{num_slots(kind, found.execution.device)} x {kind.gpu_name}" if on_gpus else f"{kind.num_cpus} cores") in names
    ]


def way_of(execution: ExecutionPlan) -> Candidate:
    return Candidate(
        device=execution.device,
        ranks=execution.ranks,
        executor=execution.executor,
        zero_stage=execution.zero_stage,
        offload=execution.offload,
        checkpointing=execution.checkpointing,
        row_tokens=execution.row_tokens,
        micro_batch_rows=execution.micro_batch_rows,
    )


def assert_within(execution: ExecutionPlan, gangs: int, footprint: Footprint, nodes: list[NodeDescription]) -> None:
    """A rank's device, and a node's memory with all ranks that may stand there."""
    needed = estimate(footprint, way_of(execution))
    for each in nodes:
        if execution.device == "cpu":
            ranks = min(each.num_cpus, execution.ranks * gangs)
            assert needed.device.total_bytes * ranks <= each.memory_bytes
            continue
        assert needed.device.total_bytes <= each.gpu_memory_bytes
        ranks = min(each.num_gpus // execution.ranks * execution.ranks or each.num_gpus, execution.ranks * gangs)
        first_ranks = max(1, ranks // execution.ranks)
        assert needed.host.total_bytes * ranks + needed.first_rank_bytes * first_ranks <= each.memory_bytes + 2 * ranks


@SETTINGS
@given(
    anatomy=anatomies(),
    cluster=clusters(),
    sections=SECTIONS,
    resources=RESOURCES,
    kind=JOBS,
    factor=st.sampled_from([1.01, 1.5, 4.0]),
)
def test_a_plan_keeps_within_memory_and_gpus_and_more_memory_never_breaks_it(
    job: Any,
    data: Any,
    anatomy: ModelAnatomy,
    cluster: ClusterDescription,
    sections: dict[str, Any],
    resources: dict[str, Any],
    kind: Any,
    factor: float,
) -> None:
    quantize = sections["quantize"]
    loaded, size = job(**sections, resources=resources), data(longest_document_tokens=sections["data"]["max_tokens"])
    found = plan_or_none(loaded, anatomy, size, cluster, kind)
    if found is None:
        return
    again = plan_or_none(loaded, anatomy, size, richer(cluster, factor), kind)
    assert again is not None, "more memory made a feasible job infeasible"
    nodes = used_nodes(found, cluster)
    for option in found.options:
        footprint = make_footprint(anatomy, option.selection, quantize, 2)
        assert option.memory.total_bytes == estimate(footprint, way_of(found.execution)).device.total_bytes
        assert_within(found.execution, found.num_gangs, footprint, nodes)
        assert_within(found.refit_execution, 1, footprint, nodes)
    assert found.placement is not None
    assert found.refit_placement is not None
    units = sum(each.count * (each.num_gpus if found.execution.device == "cuda" else each.num_cpus) for each in nodes)
    for stood in (found.placement, found.refit_placement):
        assert stood.num_gangs * stood.ranks + stood.left_over == units
        assert all(each.left_over >= 0 for each in stood.nodes)
    assert (found.placement.num_gangs, found.placement.ranks) == (found.num_gangs, found.execution.ranks)
    if found.execution.device == "cuda":
        assert found.num_gangs * found.execution.ranks <= resources.get("max_gpus", units)
    for asked, planned in (("zero", found.execution.zero_stage), ("offload", found.execution.offload)):
        if found.execution.executor == "deepspeed" and found.execution.device == "cuda":
            assert resources.get(asked, planned) == planned


@SETTINGS
@given(
    anatomy=anatomies(),
    cluster=clusters(),
    more=clusters(),
    sections=SECTIONS,
    resources=RESOURCES,
)
def test_more_nodes_never_break_a_plan(
    job: Any,
    data: Any,
    anatomy: ModelAnatomy,
    cluster: ClusterDescription,
    more: ClusterDescription,
    sections: dict[str, Any],
    resources: dict[str, Any],
) -> None:
    """Of the same kind: GPUs added to cores make another job of it."""
    if bool(cluster.num_gpus) != bool(more.num_gpus):
        return
    loaded = job(**sections, resources=resources)
    size = data(longest_document_tokens=sections["data"]["max_tokens"])
    if plan_or_none(loaded, anatomy, size, cluster, "sweep") is not None:
        both = cluster.model_copy(update={"nodes": (*cluster.nodes, *more.nodes)})
        make_plan(loaded, anatomy, size, both, job="sweep", spec_sha256="0" * 64)


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=40),
    anatomy=anatomies(),
    cluster=clusters(),
    sections=SECTIONS,
    resources=RESOURCES,
    pack=st.booleans(),
    reduced=st.integers(0, 4),
)
def test_a_step_is_the_same_documents_on_any_gang(
    job: Any,
    data: Any,
    lengths: list[int],
    anatomy: ModelAnatomy,
    cluster: ClusterDescription,
    sections: dict[str, Any],
    resources: dict[str, Any],
    pack: bool,
    reduced: int,
) -> None:
    """Whatever the plan's ranks and micro-batch, also after memory ran out: every document once, as many rounds on each."""
    sections = sections | {"data": {"max_tokens": 64, "pack": pack}}
    found = plan_or_none(job(**sections, resources=resources), anatomy, data(longest_document_tokens=64), cluster, "sweep")
    if found is None:
        return
    documents = build_set([(np.full(length, number), np.ones(length, bool)) for number, length in enumerate(lengths)])
    for execution in (found.execution, found.refit_execution):
        for _ in range(reduced):
            smaller = MemoryLadder().step(execution, "out of memory")
            execution = smaller.execution if isinstance(smaller, SmallerExecution) else execution
        packed = pack_rows(documents.lengths, np.arange(len(lengths)), execution.row_tokens, execution.pack)
        seen, rounds = Counter[int](), set[int]()
        for rank in range(execution.ranks):
            batches = micro_batches(documents, packed, rank, execution.ranks, execution.micro_batch_rows)
            rounds.add(len(batches))
            for batch in batches:
                seen.update(batch.document_ids[batch.document_ids >= 0].tolist())
        assert seen == Counter(dict(enumerate(lengths))), "every token of every document, once"
        assert len(rounds) == 1
