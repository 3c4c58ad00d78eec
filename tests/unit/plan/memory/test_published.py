"""Published runs: what ran is feasible, what did not is not. Each case names its source."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy, read_anatomy, select
from orchestrator.plan.ladder import Load, RankRoom, shortage
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.units import GIB

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "13b, vocabulary of baichuan2": {
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "vocab_size": 125696,
    },
    "llama-65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64, "num_hidden_layers": 80},
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
}


@dataclass(frozen=True)
class Run:
    base: str
    tune: str
    quantize: str
    ranks: int
    zero_stage: int
    gpu_gib: float
    rows: int
    row_tokens: int
    fits: bool
    source: str
    lora_rank: int = 8
    checkpointing: bool = True
    offload: str = "none"

    def __str__(self) -> str:
        quantize = "" if self.quantize == "none" else f" {self.quantize}"
        fits = "fits" if self.fits else "does not fit"
        offload = "" if self.offload == "none" else f", {self.offload} offloaded"
        return (
            f"{self.base} {self.tune}{quantize} on {self.ranks} x {self.gpu_gib:g} GiB, ZeRO-{self.zero_stage}{offload}: {fits}"
        )


PEFT = "huggingface.co/docs/peft/accelerate/deepspeed"
QLORA = "Dettmers et al. 2023, QLoRA, abstract: 65B on one 48 GB GPU, where 16 bit takes more than 780 GB"
PAGED = f"{QLORA}; its optimizer is paged"
BAICHUAN = "hiyouga/LlamaFactory#1158: ZeRO-2 out of memory on 4 x 80 GB; ZeRO-2 takes 8 of them, 4 take ZeRO-3"
RUNS = [
    Run("llama-2-70b", "lora", "nf4", 2, 3, 40, 2, 2048, True, f"{PEFT}: 36.6 GB a GPU"),
    Run("llama-2-70b", "lora", "nf4", 2, 2, 40, 2, 2048, False, f"{PEFT}: with DDP it took a couple of 80 GB GPUs"),
    Run("llama-2-70b", "lora", "nf4", 2, 1, 80, 2, 2048, True, f"{PEFT}: a couple of 80 GB GPUs with DDP + QLoRA"),
    Run("llama-2-70b", "lora", "nf4", 1, 0, 40, 1, 2048, False, "InternLM/xtuner#88: 40 GB is not enough", lora_rank=64),
    Run("llama-2-70b", "lora", "none", 8, 3, 80, 8, 2048, True, f"{PEFT}: 64 GB a GPU"),
    Run("llama-2-70b", "lora", "none", 8, 2, 80, 8, 2048, False, f"{PEFT}: ZeRO-3 is what it takes"),
    Run("llama-65b", "lora", "nf4", 1, 3, 48, 1, 512, True, PAGED, lora_rank=64, offload="optimizer"),
    Run("llama-65b", "lora", "nf4", 1, 0, 48, 1, 512, False, f"{QLORA}; without paging", lora_rank=64),
    Run("llama-65b", "lora", "none", 1, 0, 48, 1, 512, False, QLORA, lora_rank=64),
    Run("llama-65b", "full", "none", 8, 3, 80, 1, 512, False, QLORA),
    Run("13b, vocabulary of baichuan2", "full", "none", 4, 2, 80, 1, 1536, False, BAICHUAN),
    Run("13b, vocabulary of baichuan2", "full", "none", 4, 3, 80, 1, 1536, True, BAICHUAN),
    Run("13b, vocabulary of baichuan2", "full", "none", 8, 2, 80, 1, 1536, True, BAICHUAN),
    Run("llama-2-7b", "full", "none", 1, 0, 80, 1, 2048, False, "young-geng/EasyLM#87: 84 GB of parameters and states"),
]


@pytest.fixture
def anatomy(tmp_path: Path):
    def read(name: str) -> ModelAnatomy:
        config = LLAMA | {"vocab_size": 32000} | SHAPES[name]
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_anatomy(tmp_path, need_weights=False)

    return read


def way_of(run: Run) -> Candidate:
    return Candidate(
        device="cuda",
        ranks=run.ranks,
        executor="torch" if run.ranks == 1 and not run.zero_stage else "deepspeed",
        zero_stage=run.zero_stage,  # type: ignore[arg-type]
        offload=run.offload,  # type: ignore[arg-type]
        checkpointing=run.checkpointing,
        row_tokens=run.row_tokens,
        micro_batch_rows=run.rows,
    )


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_what_ran_is_feasible_and_what_did_not_is_not(anatomy: Any, run: Run) -> None:
    base = anatomy(run.base)
    selection = select(base, "all", run.tune, run.lora_rank if run.tune == "lora" else None, task="completion")  # type: ignore[arg-type]
    footprint = make_footprint(base, selection, run.quantize, 2)  # type: ignore[arg-type]
    load = Load(footprints=(footprint,), row_tokens=run.row_tokens, tokens_per_step=2**20)
    room = RankRoom(device_bytes=round(run.gpu_gib * GIB), host_bytes=500 * GIB, ranks_per_node=8)
    reason = shortage(way_of(run), load, room)
    assert (reason is None) == run.fits, f"{run.source}; planned: {reason}"


def test_the_published_36_6_gb_are_planned(anatomy: Any) -> None:
    """What it takes is the whole quantized base, before ZeRO-3 partitions it: within 5% of PEFT's figure."""
    run = RUNS[0]
    base = anatomy(run.base)
    footprint = make_footprint(base, select(base, "all", "lora", 8, task="completion"), "nf4", 2)
    memory = estimate(footprint, way_of(run)).device
    assert memory.phases[0].name == "loading"
    assert memory.allocated_bytes == pytest.approx(36.6e9, rel=0.05)
    smaller = estimate(footprint, replace(way_of(run), ranks=8)).device
    assert smaller.allocated_bytes == memory.allocated_bytes, "more ranks do not help: each loads it whole"
