"""The plan's shards against real DeepSpeed engines on 2 and 4 processes: every term of every rank, to the byte.

The base has odd sizes, so that nothing divides by the ranks and every padding shows. A small reduce bucket lies among the
sizes of its tensors, so that some are collected and some are sent alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.plan.memory.shards import RankShards, Shards, rank_shards

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORKER = Path(__file__).parent / "shards_worker.py"
TIMEOUT_S = 500
TERMS = ("weight_bytes", "gradient_bytes", "gradient_sum_bytes", "master_bytes", "optimizer_bytes")
SCALARS = 512
"""Bytes of norms and such that a peak has beyond the plan's."""


@dataclass(frozen=True)
class Case:
    ranks: int
    stage: Any
    dtype: Any = "bfloat16"
    tune: str = "full"
    offload: Any = "none"
    policy: str = "all+head"
    counts: tuple[int, ...] = ()

    @property
    def bucket_elements(self) -> int:
        return 100 if self.tune == "lora" else 1000

    @property
    def name(self) -> str:
        parts = [f"{self.ranks}-ranks", f"zero-{self.stage}", self.dtype, self.tune, self.offload]
        return " ".join([*parts, *map(str, self.counts)])

    def values(self, folder: Path) -> dict[str, Any]:
        execution = {
            "device": "cpu",
            "ranks": self.ranks,
            "threads_per_rank": 1,
            "executor": "deepspeed",
            "zero_stage": self.stage,
            "offload": self.offload,
            "dtype": self.dtype,
            "row_tokens": 32,
            "micro_batch_rows": 1,
        }
        own = {"name": self.name, "folder": str(folder), "bucket_elements": self.bucket_elements}
        return asdict(self) | own | {"execution": execution}

    def planned(self, counts: list[int], rank: int | None) -> RankShards:
        return rank_shards(
            counts,
            ranks=self.ranks,
            zero_stage=self.stage,
            dtype=self.dtype,
            executor="deepspeed",
            bucket_elements=self.bucket_elements,
            offload=self.offload,
            rank=rank,
        )


EVERYDAY = [
    *(Case(2, stage, tune="lora") for stage in (0, 1, 2, 3)),
    *(Case(2, stage, dtype="float32") for stage in (0, 1, 2, 3)),
    *(Case(4, stage) for stage in (1, 2, 3)),
    Case(4, 2, dtype="float32"),
    Case(2, 3, offload="optimizer"),
    Case(2, 3, tune="lora", offload="parameters"),
]
MATRIX = [
    Case(ranks, stage, dtype, tune, offload)
    for ranks in (2, 4)
    for stage in (0, 1, 2, 3)
    for dtype in ("bfloat16", "float32")
    for tune in ("lora", "full")
    for offload in (("none", "optimizer", "parameters") if stage == 3 else ("none",))
]
IN_FLIGHT = [
    Case(2, 1, counts=(100, 301, 50)),
    Case(2, 2, counts=(100,) * 31),
    Case(2, 2, counts=(100, 100, 2500, 2500, 100, 100)),
    Case(2, 2, counts=(3000, 3000, 3000, 3000)),
    Case(2, 2, counts=(70, 90, 1500, 300, 800, 33, 1100, 700, 2001, 5)),
]
"""Buckets that are full to the last element, larger tensors that a boundary of the partitions cuts, such that none cuts, and
some of everything."""


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=33,
        intermediate_size=35,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def run_ranks(folder: Path, cases: list[Case], num_ranks: int) -> list[dict[str, Any]]:
    """Every rank's answers by case, from `num_ranks` processes."""
    cases_file, meeting = folder / f"cases-{num_ranks}.json", folder / f"meeting-{num_ranks}"
    cases_file.write_text(json.dumps([case.values(folder / "base") for case in cases]))
    outs = [folder / f"out-{num_ranks}-{rank}.json" for rank in range(num_ranks)]
    logs = [out.with_suffix(".log").open("w") for out in outs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(cases_file), str(rank), str(num_ranks), str(meeting), str(out)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {"RANK": str(rank)},
        )
        for rank, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    try:
        codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            log.close()
    assert codes == [0] * num_ranks, "\n".join(out.with_suffix(".log").read_text()[-3000:] for out in outs)
    return [json.loads(out.read_text()) for out in outs]


def measure(folder: Path, cases: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """What every rank holds, by case."""
    make_base(folder / "base")
    measured: dict[str, list[dict[str, Any]]] = {}
    for num_ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == num_ranks]
        answers = run_ranks(folder, own, num_ranks)
        measured |= {case.name: [answer[case.name] for answer in answers] for case in own}
    return measured


@pytest.fixture(scope="module")
def everyday(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return measure(tmp_path_factory.mktemp("shards"), EVERYDAY + IN_FLIGHT)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return measure(tmp_path_factory.mktemp("matrix"), MATRIX)


def check(case: Case, ranks: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(ranks):
        planned = case.planned(answer["counts"], rank)
        device, host = planned.device, planned.host
        bucket = device.bucket_bytes if device.bucket_stays else 0
        terms = {term: getattr(device, term) + getattr(host, term) for term in TERMS} | {"bucket_bytes": bucket}
        assert answer["held"] == terms, rank
        own_weights = device.weight_bytes if case.stage == 0 else 0
        assert answer["new_bytes"] == sum(terms.values()) - own_weights, "every storage that came with the engine"
        if (case.stage, case.dtype) != (1, "float32"):
            assert answer["update_peak"] <= device.transient_bytes + SCALARS, rank
            assert answer["update_peak"] >= device.transient_bytes or case.offload != "none", rank
    most = case.planned(ranks[0]["counts"], None).device
    assert all(case.planned(ranks[0]["counts"], rank).device.resting_bytes <= most.resting_bytes for rank in range(case.ranks))


@pytest.mark.parametrize("case", EVERYDAY, ids=lambda case: case.name)
def test_every_rank_holds_what_is_planned(everyday: dict[str, list[dict[str, Any]]], case: Case) -> None:
    check(case, everyday[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_the_whole_matrix(matrix: dict[str, list[dict[str, Any]]], case: Case) -> None:
    check(case, matrix[case.name])


@pytest.mark.parametrize("case", IN_FLIGHT, ids=lambda case: case.name)
def test_a_backward_pass_holds_the_bucket_and_what_is_in_flight(everyday: dict[str, list[dict[str, Any]]], case: Case) -> None:
    for rank, answer in enumerate(everyday[case.name]):
        planned = case.planned(answer["counts"], rank).device
        most = planned.bucket_bytes + planned.in_flight_bytes
        assert most <= answer["backward_peak"] <= most + SCALARS, rank


def test_every_stage_has_the_optimizer_that_was_read(everyday: dict[str, list[dict[str, Any]]]) -> None:
    classes = {(case.stage, case.dtype): everyday[case.name][0]["class"] for case in EVERYDAY}
    assert classes == {
        (0, "bfloat16"): "FP16_UnfusedOptimizer",
        (0, "float32"): "AnchoredAdamW",
        (1, "bfloat16"): "BF16_Optimizer",
        (1, "float32"): "DeepSpeedZeroOptimizer",
        (2, "bfloat16"): "DeepSpeedZeroOptimizer",
        (2, "float32"): "DeepSpeedZeroOptimizer",
        (3, "bfloat16"): "DeepSpeedZeroOptimizer_Stage3",
        (3, "float32"): "DeepSpeedZeroOptimizer_Stage3",
    }


def test_the_sizes_are_awkward(everyday: dict[str, list[dict[str, Any]]]) -> None:
    """Without a remainder anywhere a wrong padding would pass."""
    all_counts = [(case, everyday[case.name][0]["counts"]) for case in EVERYDAY]
    assert all(any(count % case.ranks for count in counts) for case, counts in all_counts)
    assert all(sum(counts) % (2 * case.ranks) for case, counts in all_counts)
    assert all(min(counts) < case.bucket_elements < max(counts) for case, counts in all_counts)


def test_nothing_that_learns_holds_nothing() -> None:
    empty = rank_shards([], ranks=2, zero_stage=3, dtype="bfloat16", executor="deepspeed", bucket_elements=8)
    assert empty == RankShards(device=Shards(), host=Shards())
