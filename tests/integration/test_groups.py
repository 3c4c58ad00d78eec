"""Trials that share a batch on real Ray have the numbers that they have alone, from rung to rung."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from orchestrator.runtime.prepare import Prepared, open_run, prepare
from orchestrator.spec import load_spec
from orchestrator.units import GIB
from orchestrator.work.trial import TrialSpec

from .counter import Counter
from .runs import TIMEOUT_S, losses_in, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]

NUM_TRIALS, MAX_FUSED = 6, 4
RATES = [10**-exponent for exponent in (1.8, 2.0, 2.2, 2.4, 2.6, 2.8)]
SEARCH: dict[str, Any] = {"layers": ["last:2"], "tune": ["lora"], "lora_rank": [4], "trials": NUM_TRIALS}


@pytest.fixture
def ray_that_shares() -> Iterator[None]:
    """A private Ray whose gangs put everything that they get into one batch, whether it pays there or not."""
    os.environ.update({name: value for name, value in WORKER_ENV.items() if name not in os.environ})
    hook = {"worker_process_setup_hook": _hook()}
    ray.init(include_dashboard=False, num_cpus=2, logging_level=logging.WARNING, log_to_driver=False, runtime_env=hook)
    yield
    ray.shutdown()


def _hook() -> Callable[[], None]:
    """A function inside a function, for Ray sends such a one whole: its workers need not find this file."""

    def install() -> None:
        import os

        if "MKL_NUM_THREADS" not in os.environ:
            return  # no rank

        from orchestrator.train import fused_batch

        fused_batch.measure_batch_size = lambda context, group: (len(group), "all share a batch")  # type: ignore[assignment]

    return install


def prepared(folder: Path, ranks: int) -> Prepared:
    """A sweep with two rungs on one gang, a thread a rank, made ready and not begun."""
    loaded = load_spec(write_spec(folder, "groups", search=SEARCH, resources={"gangs": 1, "ranks_per_gang": ranks}))
    cluster = ClusterDescription(nodes=(NodeDescription(num_cpus=2, memory_bytes=8 * GIB),))
    view = LogView(io.StringIO())
    with open_run(loaded, "sweep", folder / "runs", view) as run:
        made = prepare(loaded, "sweep", run, view, lambda: cluster)
    plan = made.plan
    search = plan.search.model_copy(update={"max_fused": MAX_FUSED, "rung_steps": (4, plan.total_steps)})
    execution = plan.execution.model_copy(update={"threads_per_rank": 1})
    return replace(made, plan=plan.model_copy(update={"search": search, "execution": execution}))


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_shares_batches_has_the_losses_of_what_runs_alone(ray_that_shares: None, tmp_path: Path, ranks: int) -> None:
    counter = Counter(prepared(tmp_path, ranks), tmp_path / "trials")
    assert (counter.plan.execution.executor, counter.plan.execution.ranks) == ("torch", ranks)
    rungs = counter.plan.search.rung_steps
    shared = [counter.trial("lora", rate, number) for number, rate in enumerate(RATES)]
    alone = [trial.model_copy(update={"trial_id": f"alone-{trial.number}"}) for trial in shared]

    def ask(trial: TrialSpec, rung: int) -> Any:
        return counter.exchange.train_to_rung.remote(trial, counter.options[0].selection, 0, rung, rungs[rung])

    fetch(counter.exchange.open.remote())
    try:
        for rung in range(len(rungs)):  # the gang starts while they come
            answers: list[Answer] = [fetch(call, TIMEOUT_S) for call in [ask(trial, rung) for trial in shared]]
            assert [answer.state for answer in answers] == ["done"] * NUM_TRIALS
        for trial in alone:
            for rung in range(len(rungs)):
                fetch(ask(trial, rung), TIMEOUT_S)
    finally:
        fetch(counter.exchange.close.remote(), TIMEOUT_S)

    ledger = Ledger(tmp_path / "trials")

    def results_of(trial: TrialSpec) -> Any:
        entry = ledger.get(trial.trial_id)
        assert entry is not None
        return entry.results

    assert [results_of(trial)[0].engine.fused_trials for trial in shared] == [4, 4, 4, 4, 2, 2]
    assert all(result.engine.fused_trials == 1 for trial in alone for result in results_of(trial))
    for one, other in zip(shared, alone, strict=True):
        losses = losses_in(tmp_path / "trials" / one.trial_id)
        assert len(losses) == rungs[-1]
        assert losses == losses_in(tmp_path / "trials" / other.trial_id)
        assert [result.eval_loss for result in results_of(one)] == [result.eval_loss for result in results_of(other)]
