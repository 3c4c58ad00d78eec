"""Measure the time of `orchestrator plan` for a 70B base on four nodes, including process start.

    scripts/bench plan [--rounds 5] [--json]

Prints the median wall time beside that of an interpreter that does nothing, and beside its bound; beyond it the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC, CLUSTER = "jobs/specs/llama-70b-zero3.yaml", "cluster/examples/four-nodes-8xh100.yaml"
BOUND_S = 2.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is printed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    result = {
        "plan_seconds": _median([sys.executable, "-m", "orchestrator", "plan", SPEC, "--cluster", CLUSTER], options.rounds),
        "interpreter_seconds": _median([sys.executable, "-c", "pass"], options.rounds),
        "bound_seconds": BOUND_S,
    }
    print(json.dumps(result) if options.json else _text(result))
    if result["plan_seconds"] > BOUND_S:
        sys.exit(1)


def _median(command: list[str], rounds: int) -> float:
    """Wall time of a process; the first, which fills the page cache and writes bytecode, does not count."""
    seconds: list[float] = []
    for _ in range(rounds + 1):
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:])


def _text(result: dict[str, float]) -> str:
    return (
        f"plan         {result['plan_seconds']:.2f} s for {SPEC} on {CLUSTER}, bound {result['bound_seconds']:g} s\n"
        f"interpreter  {result['interpreter_seconds']:.2f} s for `python -c pass`"
    )


if __name__ == "__main__":
    main()
