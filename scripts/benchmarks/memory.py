"""The plan's memory against every allocation of a training step, on the published shapes of real models.

    scripts/bench memory [--bases NAME ...] [--policies POLICY ...] [--tokens N ...] [--blocks N] [--json]

Each case is one rank in bfloat16, one row a micro-batch, every position supervised: two optimizer steps and an evaluation,
counted on tensors without memory (see allocations.py). `moving` leaves out what is there all the time, weights and
states, which the plan knows to the byte: it is the harder figure, and no goal hangs on it. `--blocks` cuts the models
down to so many blocks, in the plan and in the count alike, which is quicker.
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
from orchestrator.plan.footprint import weigh
from orchestrator.plan.memory import Way, estimate
from orchestrator.units import GIB

GOAL = 0.05
SHAPES = Path(__file__).resolve().parents[2] / "jobs" / "specs" / "shapes"
BASES = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b", "mistral-7b", "mixtral-8x7b", "llama-3.1-70b")
POLICIES = ("lora all", "lora last:8", "full last:4", "full all")
LORA_RANK = 16


def main() -> None:
    options = _options()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for row in measure(options.bases, options.policies, options.tokens, options.blocks):
        rows.append(row)
        if not options.json:
            print(_line(row), flush=True)
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    if options.json:
        print(json.dumps({"cases": rows, "worst_ratio": worst["ratio"], "goal": GOAL}))
        return
    print(f"{len(rows)} cases; the worst is planned/counted {worst['ratio']:.3f}; goal within {GOAL:.0%}")


def measure(bases: list[str], policies: list[str], tokens: list[int], blocks: int | None) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    from allocations import count_step

    for name in bases:
        anatomy = _anatomy(SHAPES / name, blocks)
        for policy, checkpointing, row_tokens in itertools.product(policies, (False, True), tokens):
            selection = _selection(anatomy, policy)
            started = time.perf_counter()
            counted = count_step(anatomy, selection, rows=1, row_tokens=row_tokens, checkpointing=checkpointing)
            way = Way("cuda", 1, "torch", 0, "none", checkpointing, row_tokens)
            memory = estimate(weigh(anatomy, selection, "none", 2), way).device
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


def _anatomy(folder: Path, blocks: int | None) -> ModelAnatomy:
    if blocks is None:
        return read_anatomy(folder, need_weights=False)
    cut = Path(tempfile.mkdtemp(prefix="fewer-blocks-"))
    config = json.loads((folder / "config.json").read_bytes())
    (cut / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return read_anatomy(cut, need_weights=False)


def _selection(anatomy: ModelAnatomy, policy: str) -> LayerSelection:
    tune, layers = policy.split()
    return select(anatomy, layers, tune, LORA_RANK if tune == "lora" else None, task="completion")  # type: ignore[arg-type]


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
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
