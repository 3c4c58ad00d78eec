"""The plan's memory against `torch.cuda.max_memory_allocated`, for steps of real width on one GPU.

    scripts/bench gpu_memory [--json]

Blocks have the width of Llama-3.1-8B; their number is such that the largest case fits the GPU. The weights are as
their construction leaves them, since memory does not depend on numbers. Needs neither ray nor deepspeed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from allocations import bare_base, batch, train_and_score

from orchestrator.anatomy import ModelAnatomy, read_anatomy, select
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.train import open_branch
from orchestrator.units import GIB

GOAL = 0.10
WIDTH = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
POLICIES = (("all", "lora"), ("last:2", "lora"), ("last:2", "full"), ("all", "full"))
ROW_TOKENS = (1024, 4096)
ROWS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is False")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for row in measure(torch.device("cuda", 0)):
        rows.append(row)
        if not options.json:
            print(_line(row), flush=True)
    report = {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cases": rows,
        "worst_ratio": max((row["ratio"] for row in rows), key=lambda ratio: abs(ratio - 1)),
        "goal": GOAL,
    }
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{report['gpu']}, torch {report['torch']}: the worst is {report['worst_ratio']:.3f}; goal within {GOAL:.0%}")


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    anatomy = _anatomy(4 if torch.cuda.get_device_properties(device).total_memory > 40 * GIB else 2)
    for (layers, tune), checkpointing, row_tokens in itertools.product(POLICIES, (False, True), ROW_TOKENS):
        selection = select(anatomy, layers, tune, 16 if tune == "lora" else None, task="completion")  # type: ignore[arg-type]
        candidate = Candidate("cuda", 1, "torch", 0, "none", checkpointing, row_tokens, ROWS)
        planned = estimate(make_footprint(anatomy, selection, "none", 2), candidate).device.allocated_bytes
        base = bare_base(anatomy, device)
        torch.cuda.reset_peak_memory_stats(device)
        with open_branch(base, selection, lora_alpha=2 * (selection.lora_rank or 0), seed=0) as branch:
            train_and_score(branch, batch(ROWS, row_tokens, device), checkpointing=checkpointing).close()
            measured = torch.cuda.max_memory_allocated(device)
        del base, branch
        gc.collect()
        torch.cuda.empty_cache()
        yield {
            "policy": f"{tune} {layers}",
            "checkpointing": checkpointing,
            "row_tokens": row_tokens,
            "planned_bytes": planned,
            "measured_bytes": measured,
            "ratio": planned / measured,
        }


def _line(row: dict[str, Any]) -> str:
    candidate = f"{row['policy']:<13}{'checkpointing' if row['checkpointing'] else '':<14}{ROWS} x {row['row_tokens']:>5} tokens"
    planned, measured = row["planned_bytes"] / GIB, row["measured_bytes"] / GIB
    return f"{candidate}  planned {planned:7.2f} GiB  measured {measured:7.2f} GiB  {row['ratio']:.3f}"


def _anatomy(blocks: int) -> ModelAnatomy:
    folder = Path(tempfile.mkdtemp(prefix="shape-"))
    (folder / "config.json").write_text(json.dumps(WIDTH | {"num_hidden_layers": blocks}))
    return read_anatomy(folder, need_weights=False)


if __name__ == "__main__":
    main()
