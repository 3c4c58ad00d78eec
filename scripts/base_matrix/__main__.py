"""`scripts/bases [TYPE...] [--quick] [--write]`"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.base_matrix.page import PAGE, page
from scripts.base_matrix.published import PUBLISHED, QUICK

RESULTS = Path(__file__).with_name("results.jsonl")
SECONDS = 300
"""Longest time for a type."""


def main() -> int:
    options = arguments()
    types = options.types or (QUICK if options.quick else PUBLISHED)
    if unknown := [name for name in types if name not in PUBLISHED]:
        print(f"not in the matrix: {', '.join(unknown)}; it has {', '.join(PUBLISHED)}", file=sys.stderr)
        return 2
    failed = 0
    for row in () if options.page else examined(types, quick=options.quick):
        failed += "fails" in row
        if options.write or options.rows != RESULTS:
            keep(options.rows, row)
    if options.write or options.page:
        PAGE.write_text(page(read_rows(RESULTS)))
    return int(failed > 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bases", description="Make every type of base small, train, merge and serve it."
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all by default")
    parser.add_argument("--quick", action="store_true", help="a quarter of the types, without two ranks")
    parser.add_argument("--rows", type=Path, default=RESULTS, metavar="FILE", help="keep the rows here instead")
    parser.add_argument("--write", action="store_true", help="keep the rows in results.jsonl and write docs/bases.md")
    parser.add_argument("--page", action="store_true", help="write docs/bases.md from results.jsonl alone")
    return parser.parse_args()


def keep(file: Path, row: dict[str, Any]) -> None:
    """Put a row into a file, in the place of the type's earlier one. Several processes may write."""
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = {each["type"]: each for each in read_rows(file)} | {row["type"]: row}
        file.write_text("".join(json.dumps(known[name]) + "\n" for name in PUBLISHED if name in known))


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def examined(types: Iterable[str], *, quick: bool) -> Iterable[dict[str, Any]]:
    """Yield a row for each type, each from a process of its own. What all import is imported once, here."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="bases-") as name:
        os.environ["ORCHESTRATOR_CACHE"] = str(Path(name) / "cache")
        (Path(name) / "cache" / "anatomy").mkdir(parents=True)
        import torch
        from transformers.utils import logging

        import scripts.base_matrix.one
        import scripts.benchmarks.allocations  # noqa: F401
        from orchestrator.train.engines.deepspeed_engine import load_deepspeed

        load_deepspeed("cpu")
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        for model_type in types:
            row = in_a_process(model_type, Path(name) / model_type, quick=quick)
            print(summary(row), flush=True)
            yield row


def in_a_process(model_type: str, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return the row of a type; a process that dies or takes too long is a row too."""
    from scripts.base_matrix.one import examine

    folder.mkdir()
    answer = folder / "row.json"
    child = os.fork()
    if not child:
        try:
            os.setpgid(0, 0)
            answer.write_text(json.dumps(examine(model_type, folder, quick=quick)))
        finally:
            os._exit(0)
    until, done = time.monotonic() + SECONDS, 0
    while not done and time.monotonic() < until:
        done, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    if not done:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    row: dict[str, Any] = {"type": model_type, "base": PUBLISHED[model_type]}
    row = json.loads(answer.read_text()) if answer.exists() else row | {"fails": "the process died" if done else "timeout"}
    shutil.rmtree(folder, ignore_errors=True)
    return row


def summary(row: dict[str, Any]) -> str:
    trained = {key: row[key] for key in ("lora", "full", "nf4", "zero2", "zero3", "memory") if key in row}
    state = row.get("fails") or row.get("refused") or json.dumps(trained)
    word = "FAILS " if "fails" in row else "refused " if "refused" in row else ""
    return f"{row['type']:<20}{row.get('seconds', 0):>6} s  {word}{state}"


if __name__ == "__main__":
    sys.exit(main())
