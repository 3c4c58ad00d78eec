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
from orchestrator.errors import PlanError
from orchestrator.plan import make_plan
from orchestrator.plan.values import ClusterDescription, ExecutionPlan, NodeDescription, RunPlan
from orchestrator.units import GIB

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
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
    gpu_gib, host_gib = st.sampled_from([8, 16, 24, 40, 80, 141]), st.sampled_from([64, 512, 2000])
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
        "quantize": st.sampled_from(["none", "nf4"]),
    }
)


@SETTINGS
@given(anatomy=anatomies(), cluster=clusters(), sections=SECTIONS, factor=st.sampled_from([1.01, 1.5, 4.0]))
def test_a_plan_keeps_within_memory_and_gpus_and_more_memory_never_breaks_it(
    job: Any, data: Any, anatomy: ModelAnatomy, cluster: ClusterDescription, sections: dict[str, Any], factor: float
) -> None:
    loaded, size = job(**sections), data(longest_document_tokens=sections["data"]["max_tokens"])

    def plan(on: ClusterDescription) -> RunPlan | None:
        try:
            return make_plan(loaded, anatomy, size, on, job="sweep", spec_sha256="0" * 64)
        except PlanError:
            return None

    found, again = plan(cluster), plan(richer(cluster, factor))
    if found is None:
        return
    assert again is not None, "more memory made a feasible job infeasible"
    assert found.search is not None
    names = {kind.node.partition(" x ")[2] for kind in found.placement.nodes}
    used = [kind for kind in cluster.nodes if kind.gpu_name in names]
    assert max(option.memory.total_bytes for option in found.search.options) <= min(kind.gpu_memory_bytes for kind in used)
    for stood in (found.placement, found.refit_placement):
        assert stood.num_gangs * stood.ranks + stood.left_over == sum(kind.count * kind.num_gpus for kind in used)
        assert all(kind.left_over >= 0 for kind in stood.nodes)
    assert (found.placement.num_gangs, found.placement.ranks) == (found.num_gangs, found.execution.ranks)


@SETTINGS
@given(anatomy=anatomies(), cluster=clusters(), more=clusters(), sections=SECTIONS, most=st.none() | st.integers(1, 8))
def test_more_nodes_never_break_a_plan(
    job: Any,
    data: Any,
    anatomy: ModelAnatomy,
    cluster: ClusterDescription,
    more: ClusterDescription,
    sections: dict[str, Any],
    most: int | None,
) -> None:
    loaded = job(**sections, resources={"max_gpus": most})
    size = data(longest_document_tokens=sections["data"]["max_tokens"])
    try:
        make_plan(loaded, anatomy, size, cluster, job="sweep", spec_sha256="0" * 64)
    except PlanError:
        return
    both = cluster.model_copy(update={"nodes": (*cluster.nodes, *more.nodes)})
    make_plan(loaded, anatomy, size, both, job="sweep", spec_sha256="0" * 64)


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=40),
    ranks=st.integers(1, 9),
    rows=st.integers(1, 8),
    pack=st.booleans(),
)
def test_a_step_is_the_same_documents_on_any_gang(lengths: list[int], ranks: int, rows: int, pack: bool) -> None:
    """Whatever ranks and micro-batch, also after memory ran out: every document once, as many rounds on each rank."""
    documents = build_set([(np.full(length, number), np.ones(length, bool)) for number, length in enumerate(lengths)])
    execution = ExecutionPlan(
        device="cpu", ranks=ranks, threads_per_rank=1, executor="deepspeed", row_tokens=64, micro_batch_rows=rows, pack=pack
    )
    packed = pack_rows(documents.lengths, np.arange(len(lengths)), execution.row_tokens, execution.pack)
    seen, rounds = Counter[int](), set[int]()
    for rank in range(ranks):
        batches = micro_batches(documents, packed, rank, ranks, execution.micro_batch_rows)
        rounds.add(len(batches))
        for batch in batches:
            seen.update(batch.document_ids[batch.document_ids >= 0].tolist())
    assert seen == Counter(dict(enumerate(lengths))), "every token of every document, once"
    assert len(rounds) == 1
