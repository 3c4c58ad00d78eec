"""On real Ray: a gang begins its next trial while the last one is written; killed before that stands, it has lost both."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import orchestrator.runtime  # noqa: F401 - before a test imports ray: the private Ray asks for a token, as for users
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.report.terminal import LogView
from orchestrator.run.ledger import Ledger
from orchestrator.runtime.assignments import Answer
from orchestrator.runtime.cluster import WORKER_ENV, fetch
from orchestrator.runtime.prepare import open_run, prepare
from orchestrator.spec import load_spec
from orchestrator.store import check_folder
from orchestrator.units import GIB
from orchestrator.work.trial import TrialSpec

from .counter import Counter
from .runs import TIMEOUT_S, kill_process, losses_in, wait_until, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]

HELD = "held"
"""The trial whose first rung is not written before the test says so."""


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[Path]:
    """A private Ray on which the rung of HELD is written once this folder holds `go`; `writing` says that it has begun."""
    os.environ.update({name: value for name, value in WORKER_ENV.items() if name not in os.environ})
    hook = {"worker_process_setup_hook": _hook(str(tmp_path), HELD)}
    ray.init(include_dashboard=False, num_cpus=2, logging_level=logging.WARNING, log_to_driver=False, runtime_env=hook)
    yield tmp_path
    ray.shutdown()


def _hook(folder: str, held: str) -> Callable[[], None]:
    """A function inside a function, for Ray sends such a one whole: its workers need not find this file."""

    def install() -> None:
        import os
        import time
        from pathlib import Path

        if "MKL_NUM_THREADS" not in os.environ:
            return  # no rank

        from orchestrator.train.checkpoint import saving

        write = saving.write_snapshot

        def patient(final: Path, *rest: Any) -> None:
            if final.parent.name == held:
                (Path(folder) / "writing").touch()
                while not (Path(folder) / "go").exists():
                    time.sleep(0.01)
            write(final, *rest)

        saving.write_snapshot = patient

    return install


def counter_in(folder: Path) -> Counter:
    """The exchange of one gang with one thread, for trials of two rungs, made ready and not begun."""
    search = {"layers": ["last:2"], "tune": ["lora"], "lora_rank": [4], "trials": 4}
    loaded = load_spec(write_spec(folder, "beside", search=search, resources={"gangs": 1, "ranks_per_gang": 1}))
    cluster = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=8 * GIB),))
    view = LogView(io.StringIO())
    with open_run(loaded, "sweep", folder / "runs", view) as run:
        return Counter(prepare(loaded, "sweep", run, view, lambda: cluster), folder / "trials")


def test_a_gang_killed_between_result_and_commit_has_lost_nothing_that_was_told(slow_disk: Path) -> None:
    counter = counter_in(slow_disk)
    trials = slow_disk / "trials"
    held, beside, undisturbed = (
        counter.trial("lora", 1e-2, number).model_copy(update={"trial_id": name})
        for number, name in enumerate((HELD, "beside", "undisturbed"))
    )

    def ask(trial: TrialSpec, rung: int) -> Any:
        stop = trial.total_steps // 2 if rung == 0 else trial.total_steps
        return counter.exchange.train_to_rung.remote(trial, counter.options[0].selection, 0, rung, stop)

    def both_under_way() -> bool:
        return (slow_disk / "writing").exists() and bool(losses_in(trials / "beside"))

    fetch(counter.exchange.open.remote())
    try:
        calls = [ask(held, 0), ask(beside, 0)]
        wait_until(both_under_way)
        assert not (trials / HELD / "rung-0").exists()
        assert not (trials / HELD / "result-0.json").exists()
        assert ray.wait(calls, timeout=0)[0] == [], "nobody was told"
        (pid,) = counter.pids()
        kill_process(pid)
        (slow_disk / "go").touch()
        answers: list[Answer] = [fetch(call, TIMEOUT_S) for call in calls]
        assert [answer.state for answer in answers] == ["done", "done"]
        for trial in (held, undisturbed):
            for rung in (0, 1):
                assert fetch(ask(trial, rung), TIMEOUT_S).state == "done"
        died = [item["trial_id"] for item in fetch(counter.exchange.news.remote(0)) if item["kind"] == "gang_died"]
        (figures,) = fetch(counter.exchange.figures.remote())
    finally:
        fetch(counter.exchange.close.remote(), TIMEOUT_S)

    assert sorted(died) == ["beside", HELD]
    assert (figures.replaced, figures.base_loads) == (1, 2)
    ledger = Ledger(trials)
    results = {name: ledger.get(name).results for name in (HELD, "beside", "undisturbed")}  # type: ignore[union-attr]
    assert {name: len(found) for name, found in results.items()} == {HELD: 2, "beside": 1, "undisturbed": 2}
    assert [result.engine.from_memory for result in results["undisturbed"] if result.engine] == [False, True]
    assert losses_in(trials / HELD) == losses_in(trials / "undisturbed")
    for found in results.values():
        for result in found:
            check_folder(Path(result.checkpoint or ""))
