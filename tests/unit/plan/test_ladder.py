"""The order of ways, and the micro-batch that a way gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.anatomy import select
from orchestrator.errors import PlanError
from orchestrator.plan import make_plan
from orchestrator.plan.ladder import Load, RankRoom, candidates, cheapest, heaviest
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.spec.models import ResourcesSpec
from orchestrator.units import GIB


def load(base: Any, policy: str = "all", tokens_per_step: int = 2**20) -> Load:
    selection = select(base("8b"), policy, "lora", 16, task="completion")
    return Load(footprints=(make_footprint(base("8b"), selection, "none", 2),), row_tokens=512, tokens_per_step=tokens_per_step)


def test_cheaper_ways_come_first() -> None:
    order = [str(candidate) for candidate in candidates(ResourcesSpec(), "cuda", [1, 2], 512)]
    assert order[:10] == [
        "1 rank",
        "1 rank, checkpointing",
        "2 ranks",
        "2 ranks, ZeRO-1",
        "2 ranks, ZeRO-2",
        "2 ranks, ZeRO-3",
        "2 ranks, checkpointing",
        "2 ranks, ZeRO-1, checkpointing",
        "2 ranks, ZeRO-2, checkpointing",
        "2 ranks, ZeRO-3, checkpointing",
    ]
    assert order[10] == "1 rank, ZeRO-3, optimizer offloaded"
    assert order[-1] == "2 ranks, ZeRO-3, checkpointing, parameters offloaded"


def test_what_is_asked_for_is_deepspeeds_and_what_is_not_is_without_it_first() -> None:
    def executors(zero: Any) -> list[tuple[str, int]]:
        return [
            (candidate.executor, candidate.zero_stage)
            for candidate in candidates(ResourcesSpec(zero=zero, offload="none"), "cuda", [2], 512)
        ][:4]

    assert executors("auto") == [("torch", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
    for stage in (0, 1, 2, 3):
        assert set(executors(stage)) == {("deepspeed", stage)}


def test_whole_adapters_are_had_without_deepspeed_alone() -> None:
    order = [str(candidate) for candidate in candidates(ResourcesSpec(), "cuda", [1, 8], 512, whole_adapters=True)]
    assert order == ["1 rank", "1 rank, checkpointing", "8 ranks", "8 ranks, checkpointing"]


LONG: dict[str, Any] = {"data": {"max_tokens": 2048}, "train": {"tokens_per_step": 65536}}
PRODUCT = {"kind": "product", "strength": 2}


def planned(base: Any, job: Any, gpus: Any, data: Any, gib: int, kind: str = "sweep", **sections: Any) -> Any:
    size = data(longest_document_tokens=2048)
    return make_plan(job(**{**LONG, **sections}), base("8b"), size, gpus(memory=gib), job=kind, spec_sha256="0" * 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("resources", [{"ranks_per_gang": 8}, {}])
def test_an_anchor_on_products_takes_the_dearer_way_without_deepspeed(
    base: Any, job: Any, gpus: Any, data: Any, resources: Any
) -> None:
    """Eight ranks would part the base sooner than compute blocks again; the refit is of eight ranks in both."""
    search = {"layers": ["all"], "budget": 0.5}
    plain = planned(base, job, gpus, data, 20, search=search, resources=resources)
    assert (plain.refit_execution.executor, plain.refit_execution.ranks) == ("deepspeed", 8)
    held = planned(base, job, gpus, data, 20, search={**search, "anchor": [PRODUCT]}, resources=resources)
    assert {held.execution.executor, held.refit_execution.executor} == {"torch"}
    assert held.execution.checkpointing
    assert held.refit_execution.ranks == 8


def test_a_refit_of_products_that_only_deepspeed_would_fit_is_the_sweeps_own_gang(
    base: Any, job: Any, gpus: Any, data: Any
) -> None:
    held = planned(base, job, gpus, data, 19, search={"layers": ["all"], "budget": 0.5, "anchor": [PRODUCT]})
    assert (held.execution.ranks, held.refit_execution.ranks, held.refit_execution.executor) == (1, 1, "torch")


@pytest.mark.parametrize(
    ("kind", "place", "sections"),
    [
        ("sweep", "search.anchor[1]", {"search": {"layers": ["all"], "anchor": ["none", PRODUCT]}}),
        ("sweep", "train.anchor", {"search": {"layers": ["all"]}, "train": {**LONG["train"], "anchor": PRODUCT}}),
        ("finetune", "train.anchor", {"search": None, "finetune": {}, "train": {**LONG["train"], "anchor": PRODUCT}}),
        (
            "sweep",
            "search.points[0].anchor",
            {"search": {"algorithm": "fixed", "points": [{"layers": "all", "learning_rate": 1e-3, "anchor": PRODUCT}]}},
        ),
    ],
)
def test_where_nothing_without_deepspeed_fits_the_anchor_on_products_is_named(
    base: Any, job: Any, gpus: Any, data: Any, kind: str, place: str, sections: Any
) -> None:
    def loaded(**given: Any) -> Any:
        return replace(job(**given), places={place: (7, 11)})

    with pytest.raises(PlanError, match="which DeepSpeed partitions; and without DeepSpeed nothing fits on 8 GPUs") as caught:
        planned(base, loaded, gpus, data, 16, kind, **sections)
    assert caught.value.where == f"/specs/test.yaml:7:11: {place}"
    assert "remove the anchor, and DeepSpeed fits" in caught.value.remedy
    with pytest.raises(PlanError) as caught:
        planned(base, loaded, gpus, data, 1, kind, **sections)
    assert caught.value.where == "resources", "nothing at all fits"


@pytest.mark.parametrize("zero", ["auto", 0, 1, 2, 3])
def test_only_what_the_engine_offloads_is_planned_to_be(zero: Any) -> None:
    """`train.engines.deepspeed_engine` offloads at stage 3 alone."""
    offloading = [
        candidate for candidate in candidates(ResourcesSpec(zero=zero), "cuda", [1, 2, 8], 512) if candidate.offload != "none"
    ]
    assert {candidate.zero_stage for candidate in offloading} == ({3} if zero in ("auto", 3) else set())


def test_cores_have_nowhere_to_offload_to() -> None:
    assert [str(candidate) for candidate in candidates(ResourcesSpec(), "cpu", [1], 512)] == ["1 rank", "1 rank, checkpointing"]


@pytest.mark.parametrize("gib", [30, 40, 80])
def test_the_micro_batch_is_the_largest_that_fits(base: Any, gib: int) -> None:
    """With a step without end, one row more would be too much; rows spread evenly may leave out less than a round."""
    work, room = load(base, tokens_per_step=512 * 10**6), RankRoom(gib * GIB, 100 * GIB)
    candidate, _ = cheapest(candidates(ResourcesSpec(), "cuda", [1], 512), work, lambda _: room)
    assert candidate is not None
    assert heaviest(candidate, work.footprints).device.total_bytes <= room.device_bytes
    more = replace(candidate, micro_batch_rows=candidate.micro_batch_rows + 1)
    assert heaviest(more, work.footprints).device.total_bytes > room.device_bytes


def test_rows_are_spread_evenly_over_rounds(base: Any) -> None:
    """Of 20 rows that a step has, 18 would fit at once: two rounds of 10, not one of 18 and one of 2."""
    work = load(base, tokens_per_step=20 * 512)
    rows = [18, 10]
    per_row = [
        heaviest(replace(next(candidates(ResourcesSpec(), "cuda", [1], 512)), micro_batch_rows=n), work.footprints).device
        for n in rows
    ]
    candidate, _ = cheapest(
        candidates(ResourcesSpec(), "cuda", [1], 512), work, lambda _: RankRoom(per_row[0].total_bytes, 100 * GIB)
    )
    assert candidate is not None
    assert candidate.micro_batch_rows == 10


def test_gangs_that_were_asked_for_leave_each_other_room(base: Any, job: Any, gpus: Any, data: Any) -> None:
    """Four ranks would hold it, but eight gangs on eight GPUs leave one each."""
    sections: dict[str, Any] = {"search": {"layers": ["all"], "tune": ["full"]}}
    free = job(**sections, resources={"offload": "none"})
    assert make_plan(free, base("8b"), data(), gpus(), job="sweep", spec_sha256="0" * 64).execution.ranks > 1
    crowded = job(**sections, resources={"offload": "none", "gangs": 8})
    with pytest.raises(PlanError, match="nothing fits on 8 GPUs"):
        make_plan(crowded, base("8b"), data(), gpus(), job="sweep", spec_sha256="0" * 64)


def test_one_rank_has_the_memory_of_its_node_to_itself(base: Any, job: Any, gpus: Any, data: Any) -> None:
    """8B tuned whole on one GPU needs more host memory than an eighth of the node's."""
    sections: dict[str, Any] = {"search": {"layers": ["all"], "tune": ["full"]}, "resources": {"max_gpus": 1}}
    found = make_plan(job(**sections), base("8b"), data(), gpus(), job="sweep", spec_sha256="0" * 64)
    assert found.search is not None
    assert found.search.options[0].host_memory.total_bytes > 125 * GIB


@pytest.mark.parametrize(
    ("sections", "cluster", "told", "untold"),
    [
        (
            {"search": {"layers": ["all"], "tune": ["full"]}, "resources": {"gangs": 8}},
            {"host": 200},
            ["of host memory", "nodes with more host memory", "fewer ranks a node"],
            ["quantize", "max_tokens", "larger GPUs"],
        ),
        (
            {"search": {"layers": ["all"], "tune": ["full"]}, "resources": {"max_gpus": 1}},
            {"host": 20},
            ["of host memory", "nodes with more host memory"],
            ["fewer ranks a node", "quantize"],
        ),
        (
            {"search": {"layers": ["all"], "tune": ["full"]}, "resources": {"offload": "none", "max_gpus": 1}},
            {},
            ["more or larger GPUs", "fewer layers"],
            ["quantize", "host memory"],
        ),
        (
            {"search": {"layers": ["last:1"], "tune": ["lora"]}, "resources": {"offload": "none", "max_gpus": 1}},
            {"memory": 12},
            ["base.quantize: nf4", "more or larger GPUs"],
            ["host memory"],
        ),
    ],
)
def test_the_remedy_is_for_what_is_short(
    base: Any, job: Any, gpus: Any, data: Any, sections: Any, cluster: Any, told: list[str], untold: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(job(**sections), base("8b"), data(), gpus(**cluster), job="sweep", spec_sha256="0" * 64)
    assert [word for word in told if word not in str(caught.value)] == []
    assert [word for word in untold if word in caught.value.remedy] == []


def test_one_is_not_plural(base: Any, job: Any, gpus: Any, data: Any) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(job(resources={"gangs": 9}), base("8b"), data(), gpus(), job="sweep", spec_sha256="0" * 64)
    assert caught.value.expected == "at most 8 gangs of 1 rank"
