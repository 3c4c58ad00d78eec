"""A gang of a run that has ended, given trials by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from orchestrator.plan import make_trial
from orchestrator.runtime.assignments import Answer, Orders
from orchestrator.runtime.cluster import fetch
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.prepare import Prepared, reopen
from orchestrator.work.trial import TrialSpec

from .runs import TIMEOUT_S


class Counter:
    """The exchange of a gang, driven without Tune; its trials go to a folder of their own."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self.plan = prepared.plan
        self.options = prepared.plan.search.options
        self.folder = folder
        orders = Orders(
            plan=prepared.plan,
            anatomy=prepared.anatomy,
            settings=prepared.settings,
            data=prepared.data_paths,
            scoring=prepared.scoring,
            trials_folder=str(folder),
            num_gangs=1,
            hours_file=str(folder / "hours.json"),
        )
        actor: Any = ray.remote(Exchange)
        self.exchange = actor.options(num_cpus=0, max_concurrency=100).remote(orders)

    def trial(self, tune: str, learning_rate: float, number: int) -> TrialSpec:
        option = next(option for option in self.options if option.tune == tune)
        return make_trial(self.plan, option, learning_rate, number, seed=0)

    def train(self, trial: TrialSpec) -> Answer:
        index = next(index for index, option in enumerate(self.options) if option.tune == trial.tune)
        selection = self.options[index].selection
        return fetch(self.exchange.train_to_rung.remote(trial, selection, index, 0, trial.total_steps), TIMEOUT_S)

    def pids(self) -> tuple[int, ...]:
        return fetch(self.exchange.gang_pids.remote())[0]


@contextmanager
def open_counter(run: Path, folder: Path, *, rows: int | None = None) -> Iterator[Counter]:
    """The gang of a run; with `rows`, by a plan with so many in a micro-batch."""
    prepared = reopen(run)
    if rows is not None:
        execution = prepared.plan.execution.model_copy(update={"micro_batch_rows": rows})
        prepared = replace(prepared, plan=prepared.plan.model_copy(update={"execution": execution}))
    with prepared.run:
        counter = Counter(prepared, folder)
        fetch(counter.exchange.open.remote())
        try:
            yield counter
        finally:
            fetch(counter.exchange.close.remote(), TIMEOUT_S)
            ray.kill(counter.exchange)
