"""The plan's memory against every allocation of a training step, on the published shapes of real models.

    scripts/bench memory [--bases NAME ...] [--policies POLICY ...] [--tokens N ...] [--blocks N] [--json]
    scripts/bench memory --families
    scripts/bench memory --kinds [NAME ...]

Each case is one rank in bfloat16, one row a micro-batch, every position supervised: two optimizer steps and an evaluation,
counted on tensors without memory (see allocations.py). `moving` leaves out what is there all the time, weights and
states, which the plan knows to the byte: it is the harder figure, and no goal hangs on it. `--blocks` cuts the models
down to so many blocks, in the plan and in the count alike, which is quicker. `--families` takes four blocks of each other
layout that the anatomy knows, at a width near that of a published model, `--kinds` layouts that are learned from their class. A
policy may end in options of its adapters:
"lora all kind=dora dropout=0.1 modules=mlp".
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import itertools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.anatomy import LayerSelection, ModelAnatomy, read_anatomy, select
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.spec.adapters import AdapterOptions
from orchestrator.units import GIB

GOAL = 0.05
SHAPES = Path(__file__).resolve().parents[2] / "jobs" / "specs" / "shapes"
BASES = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b", "mistral-7b", "mixtral-8x7b", "llama-3.1-70b")
POLICIES = ("lora all", "lora last:8", "full last:4", "full all")
LORA_RANK = 16
SMALL = {"num_hidden_layers": 4, "vocab_size": 50304, "dtype": "bfloat16"}
EXPERTS = {
    "intermediate_size": 6144,
    "moe_intermediate_size": 1024,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "shared_expert_intermediate_size": 4096,
}
FAMILIES: dict[str, dict[str, Any]] = {
    name: SMALL | {"model_type": name} | sizes
    for name, sizes in {
        "gemma": {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 1},
        "gemma2": {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4},
        "gemma3_text": {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1},
        "gpt_neox": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "max_position_embeddings": 4096},
        "opt": {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "max_position_embeddings": 4096},
        "phi": {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, "max_position_embeddings": 4096},
        "phi3": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "pad_token_id": 0},
        "qwen3": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8},
        "qwen2_moe": {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16} | EXPERTS,
        "qwen3_moe": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4} | EXPERTS,
    }.items()
}
FAMILY_POLICIES = ["lora all", "full last:2"]
ROUTED = {"num_local_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    name: SMALL | {"model_type": name} | sizes
    for name, sizes in {
        "bloom": {"n_head": 16, "hidden_size": 2048, "n_layer": 4},
        "cohere": WIDE,
        "deepseek_v3": WIDE
        | {"num_key_value_heads": 16, "n_routed_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
        | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 512, "kv_lora_rank": 256},
        "falcon_h1": WIDE | {"mamba_d_ssm": 2048, "mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 64},
        "gemma2": WIDE | {"head_dim": 128},
        "gpt2": {"n_embd": 2048, "n_layer": 4, "n_head": 16},
        "gpt_oss": WIDE | ROUTED | {"head_dim": 64},
        "granite": WIDE,
        "olmo2": WIDE,
        "opt": {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 16, "word_embed_proj_dim": 2048},
        "qwen3_next": WIDE | {"num_experts": 32, "shared_expert_intermediate_size": 512, "head_dim": 128} | ROUTED,
    }.items()
}
"""Layouts whose costs are counted on their class: no formula knows them, or not all of what they do."""
KIND_POLICIES = ["lora all", "lora last:2", "full last:2"]


def main() -> None:
    options = _options()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = []
    bases, policies = _bases(options)
    for row in measure(bases, policies, options.tokens):
        rows.append(row)
        if not options.json:
            print(_line(row), flush=True)
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    if options.json:
        print(json.dumps({"cases": rows, "worst_ratio": worst["ratio"], "goal": GOAL}))
        return
    print(f"{len(rows)} cases; the worst is planned/counted {worst['ratio']:.3f}; goal within {GOAL:.0%}")


def measure(bases: dict[str, dict[str, Any]], policies: list[str], tokens: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    from allocations import count_step

    for name, config in bases.items():
        anatomy = _anatomy(config)
        for policy, checkpointing, row_tokens in itertools.product(policies, (False, True), tokens):
            selection = _selection(anatomy, policy)
            started = time.perf_counter()
            counted = count_step(anatomy, selection, rows=1, row_tokens=row_tokens, checkpointing=checkpointing)
            candidate = Candidate("cuda", 1, "torch", 0, "none", checkpointing, row_tokens)
            memory = estimate(make_footprint(anatomy, selection, "none", 2), candidate).device
            moving = sum(term.num_bytes for term in memory.terms if term.moving)
            yield {
                "base": name,
                "policy": policy,
                "checkpointing": checkpointing,
                "row_tokens": row_tokens,
                "planned_bytes": memory.allocated_bytes,
                "counted_bytes": counted.peak_bytes,
                "ratio": memory.allocated_bytes / counted.peak_bytes,
                "moving_ratio": moving / (counted.peak_bytes - counted.steady_bytes),
                "phase": memory.phases[0].name,
                "seconds": time.perf_counter() - started,
            }


def _bases(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the configs of the bases, and the policies."""
    if options.families:
        return FAMILIES, FAMILY_POLICIES
    if options.kinds is not None:
        return {name: KINDS[name] for name in options.kinds or KINDS}, options.policies or KIND_POLICIES
    return {name: _config(name, options.blocks) for name in options.bases}, options.policies or list(POLICIES)


def _config(name: str, blocks: int | None) -> dict[str, Any]:
    config = json.loads((SHAPES / name / "config.json").read_bytes())
    return config if blocks is None else config | {"num_hidden_layers": blocks}


def _anatomy(config: dict[str, Any]) -> ModelAnatomy:
    folder = Path(tempfile.mkdtemp(prefix="shape-"))
    (folder / "config.json").write_text(json.dumps(config))
    return read_anatomy(folder, need_weights=False)


def _selection(anatomy: ModelAnatomy, policy: str) -> LayerSelection:
    tune, layers, *options = policy.split()
    adapter = AdapterOptions.model_validate(dict(option.split("=") for option in options))
    rank = LORA_RANK if tune == "lora" else None
    return select(anatomy, layers, tune, rank, adapter=adapter, task="completion")  # type: ignore[arg-type]


def _line(row: dict[str, Any]) -> str:
    checkpointing = "checkpointing" if row["checkpointing"] else ""
    planned, counted = row["planned_bytes"] / GIB, row["counted_bytes"] / GIB
    return (
        f"{row['base']:<14}{row['policy']:<13}{checkpointing:<14}{row['row_tokens']:>5} tokens  planned {planned:8.2f} GiB  "
        f"counted {counted:8.2f} GiB  {row['ratio']:.3f}  moving {row['moving_ratio']:.3f}  at {row['phase']}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--policies", nargs="+")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--kinds", nargs="*", choices=KINDS)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
