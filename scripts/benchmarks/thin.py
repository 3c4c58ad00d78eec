"""Memory and start-up of the processes beside the gangs: one per concurrent Tune trial, and the exchange.

    scripts/bench thin [--json]

Runs Tune's search over the quickstart's plan. The exchange answers without training, once all concurrent trials wait for it,
so that no gang starts. Memory is the proportional set size (PSS): pages that processes share count once. Processor seconds
are given beside wall seconds because they depend less on what else the machine does.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import json
import tempfile

import orchestrator.runtime  # noqa: F401  # isort: skip - before ray: the private Ray asks for a token
import psutil
import ray

from orchestrator.anatomy import read_anatomy, resolve_base
from orchestrator.plan import make_plan
from orchestrator.plan.values import ClusterDescription, DataSize, NodeDescription, RunPlan
from orchestrator.runtime.cluster import connected
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.search import run_search
from orchestrator.spec import load_spec
from orchestrator.units import GIB, MIB

QUICKSTART = Path(__file__).resolve().parents[2] / "jobs" / "specs" / "quickstart.yaml"
TWO_CORES = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=16 * GIB),))
SMALL = DataSize(
    train_documents=700, train_tokens=18000, steps_per_epoch=36, eval_tokens=500, retain_tokens=500, longest_document_tokens=60
)
ANSWER = SimpleNamespace(score=1.0, step=1, metric=1.0, state="finished", ended=True)
LONGEST_WAIT_S = 180


class AnsweringExchange:
    """Stands in for the exchange, without gangs: measures the processes once all trials have called, then ends each trial."""

    stands_for = Exchange
    """So that this actor's process imports what the exchange's does."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials = num_trials
        self._calls = 0
        self._all_waiting = asyncio.Event()
        self._started = time.monotonic()
        self._seconds: list[float] = []
        self.processes: list[dict[str, Any]] = []

    async def train_to_rung(self, *_: Any) -> Any:
        self._calls += 1
        self._seconds.append(time.monotonic() - self._started)
        if self._calls == self._num_trials:
            self.processes = measure_siblings()
            self._all_waiting.set()
        await asyncio.wait_for(self._all_waiting.wait(), LONGEST_WAIT_S)
        return ANSWER

    async def begin(self) -> None:
        self._started = time.monotonic()

    async def finish(self, *_: Any) -> None:
        """Record nothing."""

    async def is_spent(self) -> bool:
        return False

    async def measured(self) -> dict[str, Any]:
        return {"first_call_s": self._seconds[0], "all_waiting_s": max(self._seconds), "processes": self.processes}


def measure_siblings() -> list[dict[str, Any]]:
    """This process and the other actors of its node, with their memory, processor seconds and large libraries."""
    found: list[dict[str, Any]] = []
    for process in psutil.Process(os.getppid()).children():
        title = " ".join(process.cmdline()).strip()
        if not title.startswith("ray::") or title.startswith("ray::IDLE"):
            continue
        times = process.cpu_times()
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        found.append(
            {
                "title": title,
                "pss_mib": round(process.memory_full_info().pss / MIB),
                "cpu_s": round(times.user + times.system, 2),
                "libraries": [name for name in ("torch", "tokenizers", "pyarrow") if f"/{name}/" in mapped],
            }
        )
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Run one search of as many trials as run at once."""
    loaded = load_spec(QUICKSTART, ["resources.gangs=2", "resources.ranks_per_gang=1"])
    anatomy = read_anatomy(resolve_base(loaded.spec.base.model, loaded.folder), need_weights=False)
    plan: RunPlan = make_plan(loaded, anatomy, SMALL, TWO_CORES, job="sweep", spec_sha256="")
    num_trials = plan.search.concurrent_trials
    plan = plan.model_copy(update={"search": plan.search.model_copy(update={"num_trials": num_trials})})
    with connected():
        actor: Any = ray.remote(AnsweringExchange)
        exchange = actor.options(num_cpus=0).remote(num_trials)
        ray.get(exchange.begin.remote())
        run_search(plan, exchange, [], folder, seed=0)
        return ray.get(exchange.measured.remote())


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench thin", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name))
    if options.json:
        print(json.dumps(result))
        return
    for each in result["processes"]:
        print(f"{each['title']:<28} {each['pss_mib']:>5} MiB PSS   {each['cpu_s']:>5} CPU s   {', '.join(each['libraries'])}")
    print(f"first trial calls after {result['first_call_s']:.1f} s, the last after {result['all_waiting_s']:.1f} s")


if __name__ == "__main__":
    main()
