"""Whole plans: the shipped jobs, what `resources` asks for, and laws that hold on every cluster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.anatomy import read_anatomy, resolve_base
from orchestrator.errors import BaseError, PlanError, SpecError
from orchestrator.plan import make_plan
from orchestrator.plan.ladder import OFFLOADS
from orchestrator.plan.values import ClusterDescription, DataSize, NodeDescription, RunPlan
from orchestrator.spec import load_spec, spec_sha256
from orchestrator.units import GIB

SHA = "0" * 64
SPECS = Path(__file__).parents[3] / "jobs" / "specs"


@pytest.fixture(scope="session")
def plan(base: Any, job: Any, data: Any) -> Any:
    """A plan from a base's name, a cluster, and the sections of a spec."""

    def build(
        name: str, cluster: ClusterDescription, *, kind: str = "sweep", size: DataSize | None = None, **sections: Any
    ) -> RunPlan:
        loaded = job(**sections)
        return make_plan(loaded, base(name), size or data(), cluster, job=kind, spec_sha256=SHA)  # type: ignore[arg-type]

    return build


# -- the shipped jobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_spec_has_a_plan(path: Path, data: Any, gpus: Any, cores: Any) -> None:
    loaded = load_spec(path)
    spec = loaded.spec
    anatomy = read_anatomy(resolve_base(spec.base.model, loaded.folder), need_weights=False)
    cluster = gpus(4) if anatomy.num_parameters() > 1e9 else cores(2)
    classes = 4 if spec.task == "classify" else 0
    size = data(longest_document_tokens=spec.data.max_tokens, num_classes=classes)
    for job in ("sweep", "finetune"):
        if getattr(spec, {"sweep": "search", "finetune": "finetune"}[job]) is not None:
            found = make_plan(loaded, anatomy, size, cluster, job=job, spec_sha256=spec_sha256(spec, job))  # type: ignore[arg-type]
            assert RunPlan.model_validate_json(found.model_dump_json()) == found


def test_the_shipped_8b_fills_its_node_with_gangs_of_one_rank(data: Any, gpus: Any) -> None:
    """As its comments say; with `full` on every layer the gangs would be half as many, of two ranks."""
    loaded = load_spec(SPECS / "llama-8b-qlora.yaml")
    anatomy = read_anatomy(resolve_base(loaded.spec.base.model, loaded.folder), need_weights=False)
    size = data(longest_document_tokens=loaded.spec.data.max_tokens)
    found = make_plan(loaded, anatomy, size, gpus(1), job="sweep", spec_sha256=SHA)
    assert (found.num_gangs, found.execution.ranks, found.execution.executor) == (8, 1, "torch")
    assert (found.rejected, found.warnings) == ((), ())


def test_an_8b_in_nf4_takes_one_rank_of_eight_gangs(plan: Any, gpus: Any) -> None:
    found = plan("8b", gpus(), quantize="nf4", search={"tune": ["lora"]}, train={"tokens_per_step": 32768})
    assert (found.num_gangs, found.execution.ranks, found.execution.executor) == (8, 1, "torch")
    assert not found.execution.checkpointing
    assert found.refit_execution.ranks == 8
    assert (found.refit_execution.executor, found.refit_execution.zero_stage) == ("torch", 0)


def test_a_70b_in_16_bit_needs_stage_3_and_says_why(plan: Any, gpus: Any) -> None:
    started = time.monotonic()
    found = plan("70b", gpus(4), search={"tune": ["lora"]}, train={"tokens_per_step": 131072})
    assert time.monotonic() - started < 1
    assert found.execution.zero_stage == 3
    assert found.execution.offload == "none"
    assert found.num_gangs * found.execution.ranks == 32
    refused = {rejected.way: rejected.reason for rejected in found.rejected}
    assert "frozen weights: 131.4 GiB" in refused[f"{found.execution.ranks} ranks, ZeRO-2"]
    assert any(candidate.startswith("1 rank") for candidate in refused)


def test_a_merged_model_larger_than_a_gpu_is_verified_on_the_cpu_and_the_plan_says_so(plan: Any, gpus: Any) -> None:
    large = plan("70b", gpus(4), search={"tune": ["lora"]}, train={"tokens_per_step": 131072})
    (said,) = [warning for warning in large.warnings if "on the CPU" in warning]
    assert said.startswith("the merged model (131.4 GiB) is more than 70% of one GPU (80.0 GiB)")
    assert "host memory" not in said
    assert plan("8b", gpus(), search={"tune": ["lora"]}).warnings == ()


def test_several_nodes_need_shared_storage(plan: Any, gpus: Any) -> None:
    assert any("storage that every node sees" in warning for warning in plan("tiny", gpus(2)).warnings)
    assert plan("tiny", gpus(1)).warnings == ()


def test_a_retention_set_that_is_not_used_is_told(plan: Any, gpus: Any, data: Any) -> None:
    size = data(num_classes=3)
    ignored = plan("tiny", gpus(), size=size, task="classify", data={"retain": "general.jsonl"})
    assert any(warning.startswith("data.retain is not used") for warning in ignored.warnings)
    assert plan("tiny", gpus(), size=size, task="classify").warnings == ()
    assert plan("tiny", gpus(), data={"retain": "general.jsonl"}).warnings == ()


def test_the_control_head_is_planned_for(plan: Any, gpus: Any) -> None:
    """An 8B in nf4 with two blocks adapted fits 12 GiB; its head, learning in full, does not, and that is said before."""
    search = {"layers": ["last:2"], "tune": ["lora"]}
    short = plan("8b", gpus(1, 1, 12), quantize="nf4", search=search)
    assert any("the control `head` will run out of memory" in warning for warning in short.warnings)
    assert short.execution.offload == "none", "a control is no reason for a dearer gang"
    enough = plan("8b", gpus(1, 1, 24), quantize="nf4", search=search)
    assert not any("control" in warning for warning in enough.warnings)
    assert enough.head_memory.total_bytes <= 24 * GIB


def test_full_tuning_of_an_8b_partitions_its_optimizer(plan: Any, gpus: Any) -> None:
    found = plan("8b", gpus(), search={"layers": ["all"], "tune": ["full"]})
    assert found.execution.ranks > 1
    assert found.execution.zero_stage >= 1
    assert "Adam's moments" in found.rejected[0].reason


def test_parameters_are_offloaded_before_giving_up(plan: Any, gpus: Any) -> None:
    found = plan("70b", gpus(each=1, memory=80, host=1000), search={"layers": ["last:2"], "tune": ["lora"]})
    assert (found.execution.offload, found.execution.zero_stage, found.execution.executor) == ("parameters", 3, "deepspeed")


def test_nothing_is_partitioned_where_a_rank_holds_it_all(plan: Any, gpus: Any) -> None:
    """Two ranks of a base that one would hold share the documents of a step, and nothing else; trials may share a batch."""
    found = plan("tiny", gpus(), resources={"ranks_per_gang": 2}, search={"tune": ["lora"]}, train={"tokens_per_step": 4096})
    assert (found.execution.executor, found.execution.zero_stage, found.execution.backend) == ("torch", 0, "nccl")
    assert found.num_gangs == 4
    assert (
        "each of 2 ranks holds all trainable parameters and sums gradients with the others: DeepSpeed is not needed"
    ) in found.reasons
    assert found.search.max_fused > 1


def test_the_first_stage_that_fits_is_taken(plan: Any, gpus: Any) -> None:
    """Half of an 8B learns: masters and moments fit in eight parts, and whole they do not."""
    sections = {"search": {"layers": ["last:16"], "tune": ["full"]}, "resources": {"ranks_per_gang": 8, "offload": "none"}}
    found = plan("8b", gpus(memory=64), quantize="none", **sections)
    assert (found.execution.executor, found.execution.ranks) == ("deepspeed", 8)
    assert found.execution.zero_stage >= 1
    assert found.rejected[0].way == "8 ranks"
    assert "on every rank" in found.rejected[0].reason


# -- cores ------------------------------------------------------------------------------------------------------------


def test_cores_take_one_rank_each(plan: Any, cores: Any) -> None:
    found = plan("tiny", cores(4, memory=16))
    assert (found.num_gangs, found.execution.ranks, found.execution.threads_per_rank) == (4, 1, 1)
    assert (found.execution.device, found.execution.backend, found.execution.executor) == ("cpu", "gloo", "torch")
    assert found.execution.micro_batch_rows * found.execution.row_tokens <= 4096
    assert found.refit_execution.ranks == 4
    assert found.gpu_hours is None


def test_a_search_has_as_many_rungs_as_are_asked_for(plan: Any, cores: Any) -> None:
    first: list[int] = []
    for count in (1, 2, 3, 4):
        search = plan("tiny", cores(4, memory=16), search={"rungs": count}, train={"epochs": 30}).search
        assert len(search.rung_steps) == count
        first.append(search.rung_steps[0])
    assert first == sorted(first, reverse=True)


@pytest.mark.parametrize(("bound", "gangs"), [(1, 1), (3, 3), (100, 4)])
def test_max_gpus_bounds_cores_where_the_job_trains_on_cores(plan: Any, cores: Any, bound: int, gangs: int) -> None:
    found = plan("tiny", cores(4), resources={"max_gpus": bound})
    assert (found.num_gangs, found.execution.ranks, found.execution.threads_per_rank) == (gangs, 1, 1)
    assert found.refit_execution.ranks * found.refit_execution.threads_per_rank <= bound
    told = [note for note in found.notes if "max_gpus" in note]
    assert told == ([f"max_gpus: {bound} limits cores if no GPU is used: {bound} of 4 cores train"] if bound < 4 else [])


def test_max_gpus_bounds_the_threads_of_one_trial_on_cores(plan: Any, cores: Any) -> None:
    found = plan("tiny", cores(8), kind="finetune", finetune={}, resources={"max_gpus": 2})
    assert (found.num_gangs, found.execution.ranks, found.execution.threads_per_rank) == (1, 1, 2)


def test_more_gangs_than_max_gpus_allows_cores_are_refused(plan: Any, cores: Any) -> None:
    with pytest.raises(PlanError, match="max_gpus: 1 allows 1"):
        plan("tiny", cores(4), resources={"max_gpus": 1, "gangs": 2})


@pytest.mark.parametrize(("most", "threads"), [(None, 4), (1, 1), (3, 3), (64, 4)])
def test_the_environment_bounds_the_threads_of_a_rank(plan: Any, cores: Any, most: int | None, threads: int) -> None:
    machine = cores(8).model_copy(update={"max_threads": most})
    found = plan("tiny", machine, search={"trials": 2})
    assert (found.num_gangs, found.execution.threads_per_rank) == (2, threads)
    told = [reason for reason in found.reasons if "OMP_NUM_THREADS" in reason]
    assert len(told) == (threads < 4)
    assert all(f"OMP_NUM_THREADS={most} is set; without it a rank would have 4" in reason for reason in told)


def test_fewer_trials_than_cores_get_more_threads(plan: Any, cores: Any) -> None:
    found = plan("tiny", cores(8), search={"trials": 2})
    assert (found.num_gangs, found.execution.threads_per_rank) == (2, 4)


def test_little_memory_means_fewer_gangs(plan: Any, cores: Any) -> None:
    found = plan("tiny", cores(8, memory=2.5))
    assert 1 <= found.num_gangs < 8
    assert "gangs" in found.rejected[0].way


def test_one_trial_on_cores_is_one_process_with_every_thread(plan: Any, cores: Any) -> None:
    found = plan("tiny", cores(4), kind="finetune", finetune={"layers": "last:1", "learning_rate": 3e-4})
    assert (found.num_gangs, found.execution.ranks, found.execution.threads_per_rank) == (1, 1, 4)
    assert found.search is None
    assert found.finetune is not None
    assert (found.finetune.learning_rate_low, found.finetune.learning_rate_high) == (3e-4, 3e-4)


def test_one_trial_on_gpus_takes_as_many_ranks_as_a_step_has_rows(plan: Any, gpus: Any) -> None:
    found = plan("tiny", gpus(), kind="finetune", finetune={}, train={"tokens_per_step": 2048})
    assert found.execution.ranks == 4, "2048 tokens are four rows of 512"


# -- what was asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"zero": 2}, {"ranks": 1, "executor": "deepspeed", "zero_stage": 2}),
        ({"zero": 0}, {"ranks": 1, "executor": "deepspeed", "zero_stage": 0}),
        ({"ranks_per_gang": 2, "zero": 0}, {"ranks": 2, "executor": "deepspeed", "zero_stage": 0}),
        ({"ranks_per_gang": 4, "zero": 3}, {"ranks": 4, "zero_stage": 3}),
        ({"offload": "optimizer"}, {"executor": "deepspeed", "zero_stage": 3, "offload": "optimizer"}),
        ({"offload": "parameters"}, {"executor": "deepspeed", "zero_stage": 3, "offload": "parameters"}),
        ({"accelerator": "cpu"}, {"device": "cpu", "executor": "torch"}),
        ({"max_gpus": 3}, {"device": "cuda", "ranks": 1}),
    ],
)
def test_resources_are_obeyed(plan: Any, gpus: Any, resources: dict[str, Any], expected: dict[str, Any]) -> None:
    execution = plan("tiny", gpus(), resources=resources).execution
    assert {name: getattr(execution, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("resources", "gangs"),
    [({"gangs": 3}, 3), ({"max_gpus": 3}, 3), ({"ranks_per_gang": 3}, 2), ({"gangs": 2, "ranks_per_gang": 4}, 2)],
)
def test_gangs_are_obeyed(plan: Any, gpus: Any, resources: dict[str, Any], gangs: int) -> None:
    assert plan("tiny", gpus(), resources=resources).num_gangs == gangs


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"ranks_per_gang": 4, "gangs": 3}, "3 gangs of 4 ranks need 12 GPUs, and the cluster has 8"),
        ({"ranks_per_gang": 16}, "1 gang of 16 ranks needs 16 GPUs, and the cluster has 8"),
        ({"gangs": 6, "max_gpus": 4}, "max_gpus: 4 allows 4"),
        ({"zero": 2, "offload": "parameters"}, "ZeRO stage 2 cannot offload the parameters"),
        ({"zero": 2, "offload": "optimizer"}, "ZeRO stage 2 cannot offload the optimizer"),
        ({"zero": 0, "offload": "optimizer"}, "ZeRO stage 0 cannot offload the optimizer"),
    ],
)
def test_what_cannot_be_obeyed_is_said(plan: Any, gpus: Any, resources: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan("tiny", gpus(), resources=resources)
    assert caught.value.exit_code == 3
    assert caught.value.remedy


def test_a_gpu_is_asked_for_where_there_is_none(plan: Any, cores: Any) -> None:
    with pytest.raises(PlanError, match="a GPU is required") as caught:
        plan("tiny", cores(), resources={"accelerator": "gpu"})
    assert caught.value.where == "resources.accelerator"


def test_more_cores_than_there_are(plan: Any, cores: Any) -> None:
    with pytest.raises(PlanError, match="2 gangs of 2 ranks need 4 cores, and the cluster has 2"):
        plan("tiny", cores(2), resources={"gangs": 2, "ranks_per_gang": 2})


def few_cpus(count: int) -> ClusterDescription:
    node = NodeDescription(num_cpus=count, num_gpus=8, gpu_memory_bytes=80 * GIB, memory_bytes=1000 * GIB)
    return ClusterDescription(nodes=(node,), source="test")


def test_a_rank_takes_cpus_too_and_a_gpu_without_them_stays_idle(plan: Any) -> None:
    """Half a CPU for a rank, and a hundredth for each of its gang's trials: four CPUs carry seven ranks."""
    found = plan("tiny", few_cpus(4))
    assert found.num_gangs * found.execution.ranks == 7
    assert "1 of 8 GPUs stay idle" in found.warnings[0]
    assert plan("tiny", few_cpus(5)).warnings == ()


def test_more_ranks_than_the_cpus_carry_are_refused_before_anything_waits(plan: Any) -> None:
    with pytest.raises(
        PlanError, match=r"8 gangs of 1 rank need 8 GPUs, and the cluster's CPUs \(4\) place ranks on 7"
    ) as caught:
        plan("tiny", few_cpus(4), resources={"gangs": 8})
    assert caught.value.exit_code == 3
    with pytest.raises(PlanError, match="no rank can be placed: the cluster has 8 GPUs and 0 CPUs"):
        plan("tiny", few_cpus(0))


def test_widths_that_nf4_gets_wrong_on_a_cpu_are_refused(plan: Any, cores: Any, gpus: Any) -> None:
    with pytest.raises(BaseError, match=r"does not support model\.layers\.0\.self_attn\.q_proj\.weight: 96 columns") as caught:
        plan("narrow", cores(), quantize="nf4")
    assert caught.value.exit_code == 2
    for name, cluster, quantize in (("narrow", cores(), "none"), ("narrow", gpus(), "nf4"), ("tiny", cores(), "nf4")):
        assert plan(name, cluster, quantize=quantize).num_gangs


def test_what_does_not_fit_names_the_term_and_the_remedy(plan: Any, gpus: Any) -> None:
    with pytest.raises(PlanError, match=r"frozen weights: 131\.4 GiB") as caught:
        plan("70b", gpus(each=1), resources={"offload": "none", "zero": 2}, search={"tune": ["lora"]})
    assert "base.quantize: nf4" in caught.value.remedy
    assert "resources.zero and resources.offload: auto" in caught.value.remedy


def test_a_small_host_cannot_take_what_is_offloaded(plan: Any, gpus: Any) -> None:
    with pytest.raises(PlanError, match="host memory"):
        plan("70b", gpus(each=1, host=64), search={"layers": ["last:2"], "tune": ["lora"]})


def test_a_missing_section_is_a_mistake_in_the_spec(plan: Any, cores: Any) -> None:
    with pytest.raises(SpecError, match="finetune"):
        plan("tiny", cores(), kind="finetune")


def test_no_nodes(plan: Any) -> None:
    with pytest.raises(PlanError, match="no nodes"):
        plan("tiny", ClusterDescription(nodes=()))


# -- laws -------------------------------------------------------------------------------------------------------------

MEMORY_GIB = st.sampled_from([3, 6, 10, 16, 24, 40, 80, 141])
SECTIONS = st.fixed_dictionaries(
    {
        "quantize": st.sampled_from(["none", "nf4"]),
        "search": st.fixed_dictionaries(
            {
                "layers": st.sampled_from([["head"], ["last:2"], ["last:2", "all"]]),
                "tune": st.sampled_from([["lora"], ["full"], ["lora", "full"]]),
                "trials": st.integers(1, 30),
            }
        ),
        "train": st.fixed_dictionaries({"tokens_per_step": st.sampled_from([512, 4096, 65536])}),
        "resources": st.fixed_dictionaries(
            {},
            optional={
                "zero": st.sampled_from([0, 1, 2, 3, "auto"]),
                "offload": st.sampled_from(["none", "auto"]),
                "ranks_per_gang": st.sampled_from([1, 2, 3, 8, "auto"]),
                "gangs": st.sampled_from([1, 2, "auto"]),
                "max_gpus": st.sampled_from([1, 5, 100]),
            },
        ),
    }
)
LAWS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def estimates(found: RunPlan) -> Iterator[int]:
    assert found.search is not None
    yield from (option.memory.total_bytes for option in found.search.options)


@LAWS
@given(
    name=st.sampled_from(["tiny", "8b", "70b"]),
    nodes=st.integers(1, 4),
    each=st.integers(1, 8),
    memory=MEMORY_GIB,
    sections=SECTIONS,
)
def test_a_plan_keeps_within_gpus_and_memory_and_more_memory_never_hurts(
    plan: Any, gpus: Any, name: str, nodes: int, each: int, memory: int, sections: dict[str, Any]
) -> None:
    try:
        found = plan(name, gpus(nodes, each, memory), **sections)
    except PlanError:
        return
    used = found.num_gangs * found.execution.ranks
    allowed = min(nodes * each, sections["resources"].get("max_gpus", 1000))
    assert 1 <= used <= allowed
    assert found.refit_execution.ranks <= allowed
    assert max(estimates(found)) <= memory * GIB
    assert found.execution.micro_batch_rows >= 1
    richer = plan(name, gpus(nodes, each, memory * 2), **sections).execution
    assert OFFLOADS.index(richer.offload) <= OFFLOADS.index(found.execution.offload)
    if richer.offload == found.execution.offload:
        assert richer.ranks <= found.execution.ranks


@LAWS
@given(
    kinds=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 8), MEMORY_GIB), min_size=1, max_size=4),
    name=st.sampled_from(["tiny", "8b", "70b"]),
    sections=SECTIONS,
)
def test_no_gpu_of_unlike_nodes_is_used_twice(
    plan: Any, kinds: list[tuple[int, int, int]], name: str, sections: dict[str, Any]
) -> None:
    nodes = tuple(
        NodeDescription(count=n, num_cpus=96, num_gpus=each, gpu_memory_bytes=memory * GIB, memory_bytes=1000 * GIB)
        for n, each, memory in kinds
    )
    try:
        found = plan(name, ClusterDescription(nodes=nodes, source="test"), **sections)
    except PlanError:
        return
    for stood, gangs, ranks in (
        (found.placement, found.num_gangs, found.execution.ranks),
        (found.refit_placement, 1, found.refit_execution.ranks),
    ):
        assert (stood.num_gangs, stood.ranks) == (gangs, ranks), "every gang of the plan has a place"
        assert all(kind.left_over >= 0 for kind in stood.nodes)
        assert gangs * ranks + stood.left_over == sum(kind.count * int(kind.node.split()[0]) for kind in stood.nodes)
        assert (
            sum(kind.gangs_inside for kind in stood.nodes) * ranks + sum(kind.ranks_spanning for kind in stood.nodes)
            == gangs * ranks
        )
    places = {int(kind.node.split()[0]) for kind in found.placement.nodes}
    assert max(estimates(found)) <= max(memory for _, each, memory in kinds if each in places) * GIB


@LAWS
@given(
    count=st.integers(1, 16),
    memory=st.sampled_from([1, 2, 4, 16, 64, 256]),
    name=st.sampled_from(["tiny", "8b"]),
    sections=SECTIONS,
)
def test_ranks_on_cores_share_one_memory(
    plan: Any, cores: Any, count: int, memory: int, name: str, sections: dict[str, Any]
) -> None:
    try:
        found = plan(name, cores(count, memory), **sections)
    except PlanError:
        return
    ranks = found.num_gangs * found.execution.ranks
    assert ranks <= count
    assert ranks * found.execution.threads_per_rank <= count
    assert max(estimates(found)) * ranks <= memory * GIB
    assert plan(name, cores(count, memory * 2), **sections).num_gangs >= found.num_gangs


@LAWS
@given(
    tokens_per_step=st.integers(64, 100_000),
    max_tokens=st.integers(8, 4000),
    ranks=st.sampled_from([1, 2, 4]),
    pack=st.booleans(),
)
def test_rows_hold_any_document_and_rounds_hold_a_step(
    plan: Any, gpus: Any, data: Any, tokens_per_step: int, max_tokens: int, ranks: int, pack: bool
) -> None:
    longest = min(max_tokens, 700)
    found = plan(
        "tiny",
        gpus(),
        size=data(longest_document_tokens=longest),
        data={"max_tokens": max_tokens, "pack": pack},
        train={"tokens_per_step": tokens_per_step},
        resources={"ranks_per_gang": ranks},
    ).execution
    assert found.row_tokens >= longest
    assert found.row_tokens % 8 == 0
    assert found.micro_batch_rows == 1 or found.micro_batch_rows * found.row_tokens * ranks <= tokens_per_step


@pytest.mark.parametrize(("nodes", "dtype"), [(100, "bfloat16"), (100, "float32"), (100_000, "bfloat16")])
def test_a_plan_takes_no_longer_for_more_nodes(plan: Any, gpus: Any, nodes: int, dtype: str) -> None:
    started = time.process_time()
    sections: dict[str, Any] = {"search": {"layers": ["all", "last:8"], "tune": ["full", "lora"]}, "train": {"dtype": dtype}}
    with contextlib.suppress(PlanError):
        plan("70b", gpus(nodes), **sections)
    assert time.process_time() - started < 5
