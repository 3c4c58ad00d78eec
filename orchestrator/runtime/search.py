"""The search: Tune decides which trial continues, gangs do the work.

A Tune trial here is thin: it asks the exchange to train it to the next rung, waits for the answer, and
reports it. It holds no GPU and no core, and runs on the driver's node: a lost worker node takes only its gang with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.anatomy import LayerSelection, ModelAnatomy
from orchestrator.errors import TrainingError
from orchestrator.plan import make_trial, none_control
from orchestrator.plan.schedule import asha_time
from orchestrator.plan.values import SearchPlan, SweepPlan
from orchestrator.run.ledger import TrialEntry
from orchestrator.runtime.assignments import Answer
from orchestrator.runtime.cluster import fetch, own_node
from orchestrator.runtime.failures import cause_of
from orchestrator.runtime.proposals import Known, Proposal, propose
from orchestrator.work.trial import TrialSpec

MAX_RESTARTS = 1
"""Restarts by Tune of a thin trial that failed on its own: its finished rungs are answered from the ledger. If the exchange is
gone, each restart wastes seconds."""
# Tune refuses trials without resources. Every node has 1.0 of a resource of its own address, so this allows 10,000 of them.
SHARE_OF_NODE = 1e-4
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Environment variables that `ray.tune.execution.class_cache` passes on."""


def submit(exchange: Any, trial: TrialSpec, selection: LayerSelection, stops: Sequence[int]) -> Any:
    """Submit a trial to the gangs; pass the returned call to `wait_for`.

    Args:
        stops: The step at which each of its rungs ends.
    """
    return exchange.train_to_end.remote(trial, selection, tuple(stops))


def wait_for(exchange: Any, trial_id: str, call: Any) -> Answer:
    """Wait for a submitted trial to end, and return its last answer."""
    answer = fetch(call)
    fetch(exchange.finish.remote(trial_id, "failed" if answer.state == "failed" else "finished"))
    return answer


def evaluate_base(plan: SweepPlan, anatomy: ModelAnatomy, exchange: Any, seed: int) -> None:
    """Have the base model evaluated: every trial is compared with it.

    Raises:
        TrainingError: it could not be evaluated.
    """
    answer = wait_for(exchange, "none", submit(exchange, *none_control(plan, anatomy, seed), [0]))
    if answer.state == "failed":
        raise TrainingError(
            f"the base model could not be evaluated: {answer.reason}",
            remedy="fix the reported error and submit the same spec again: it is evaluated again",
        )


class RecordedSearch(Searcher):
    """Tune's search algorithm: recorded trials are proposed again first, then those of `propose`.

    Recorded trials cost nothing, since the exchange answers them from the ledger; they fill the scheduler's rungs
    and the sampler's memory. With `in_batches`, proposals wait for the whole batch before them, so that they do not
    depend on who finished first. Where `is_over` says so, no new trial is proposed.
    """

    def __init__(
        self,
        plan: SweepPlan,
        seed: int,
        recorded: list[TrialEntry],
        *,
        in_batches: bool,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric="score", mode="min")
        self._plan = plan
        self._search = plan.search
        self._seed = seed
        self._is_over = is_over
        self._batch = plan.search.concurrent_trials if in_batches else None
        self._recorded = {entry.trial.number: entry for entry in recorded}
        self._number = 0
        self._proposed: list[Proposal] = []
        """Proposed trials, by number."""
        self._open: dict[str, tuple[int, Proposal]] = {}
        self._known: dict[int, Known] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        number = self._number
        if self._batch and self._open and number % self._batch == 0:
            return None
        entry = self._recorded.get(number)
        if entry is not None and entry.option is not None:
            proposal, trial = Proposal(entry.option, entry.trial.learning_rate), entry.trial
        elif self._is_over():
            return cast("dict[str, Any]", Searcher.FINISHED)  # Tune's own sentinel
        else:
            proposal = propose(self._search, self._seed, number, self._known_to(number), self._pending_at(number))
            trial = make_trial(self._plan, self._search.options[proposal.option], proposal.learning_rate, number, self._seed)
        self._number += 1
        self._proposed.append(proposal)
        self._open[trial_id] = (number, proposal)
        return {"trial": trial.model_dump(mode="json"), "option": proposal.option}

    def _known_to(self, number: int) -> list[Known]:
        """Return the results that a proposal may use; in batches, those known when its batch began."""
        first = number - number % self._batch if self._batch else number
        return [self._known[other] for other in sorted(self._known) if other < first]

    def _pending_at(self, number: int) -> list[Proposal]:
        """Return the trials pending beside a proposal; in batches, the whole previous batch, including trials that have ended
        since."""
        if self._batch:
            return self._proposed[number - number % self._batch :]
        return [proposal for _, proposal in sorted(self._open.values(), key=lambda pair: pair[0])]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number, proposal = self._open.pop(trial_id)
        if result is not None and "score" in result and not error:
            self._known[number] = Known(proposal, float(result["score"]))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the memory."""


def thin_trial(config: dict[str, Any], exchange: Any, plan: SweepPlan) -> None:
    """Take one trial from rung to rung until the scheduler stops it."""
    trial = TrialSpec.model_validate(config["trial"])
    option = plan.search.options[config["option"]]
    for rung, stop_step in enumerate(plan.search.rung_steps):
        answer = fetch(exchange.train_to_rung.remote(trial, option.selection, config["option"], rung, stop_step))
        tune.report(
            {
                "score": answer.score,
                "pace": asha_time(plan.search, rung),
                "step": answer.step,
                "metric": answer.metric,
                "state": answer.state,
            }
        )
        if answer.ended:
            return


class EndOfTrial(tune.Callback):
    """Tells the exchange at once when a trial has ended, so that its place is free."""

    def __init__(self, exchange: Any, last_pace: int) -> None:
        self._exchange = exchange
        self._last_pace = last_pace

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        finished = result.get("pace", 0) >= self._last_pace
        state = "failed" if result.get("state") == "failed" else "finished" if finished else "stopped"
        self._exchange.finish.remote(trial.config["trial"]["trial_id"], state)


def run_search(plan: SweepPlan, exchange: Any, recorded: list[TrialEntry], folder: Path, seed: int) -> None:
    """Run Tune until every trial has ended. Results are in the ledger, not in Tune's own folder.

    Args:
        exchange: Handle of the Exchange actor.
        recorded: Searched trials of earlier submissions.
        folder: Where Tune keeps its own experiment.
    """
    search = plan.search
    # Tune's newer output writes tables to the terminal beside the run's own progress.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune's own handler makes an interrupted search look finished.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    in_batches = search.scheduler == "none" and search.algorithm == "optuna"
    last_pace = asha_time(search, len(search.rung_steps) - 1)
    trainable = tune.with_resources(tune.with_parameters(thin_trial, exchange=exchange, plan=plan), _beside_the_driver())
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="min",
            num_samples=search.num_trials,
            search_alg=RecordedSearch(
                plan, seed, recorded, in_batches=in_batches, is_over=lambda: fetch(exchange.is_spent.remote())
            ),
            scheduler=_scheduler(search, last_pace),
            max_concurrent_trials=search.concurrent_trials,
            # Starting a process for each of 16 trials took 33 s on two cores, and reusing four of them 7 s.
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(folder),
            verbose=0,
            # A trial that ASHA stops is not told: the callback follows its last report by milliseconds, and frees the gang's
            # place.
            callbacks=[EndOfTrial(exchange, last_pace)],
            failure_config=tune.FailureConfig(max_failures=MAX_RESTARTS),
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # we report the error once, without forty lines of traceback
    with _without_credentials():
        results = tuner.fit()
    if results.num_errors:
        # A trial's own failure is a result. An error here is one of Tune, Ray or the exchange: no trial is recorded as failed.
        raise cause_of(results.errors[0])


def _beside_the_driver() -> tune.PlacementGroupFactory:
    """Return a placement on the driver's own node that reserves almost nothing, also if that node offers no cores."""
    node_id, address = own_node()
    return tune.PlacementGroupFactory([{f"node:{address}": SHARE_OF_NODE}], bundle_label_selector=[{"ray.io/node-id": node_id}])


@contextlib.contextmanager
def _without_credentials() -> Iterator[None]:
    """Hide the credentials of object stores from Tune, which would copy them into each trial's runtime environment, and Ray
    logs that in plain text. A thin trial needs none."""
    held = {name: os.environ.pop(name) for name in CREDENTIALS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def _scheduler(search: SearchPlan, last_pace: int) -> TrialScheduler:
    """Return ASHA (Li et al. 2020) over the plan's rungs; without it every trial is trained to its end."""
    if search.scheduler == "none" or len(search.rung_steps) == 1:
        return FIFOScheduler()
    return AsyncHyperBandScheduler(time_attr="pace", grace_period=1, max_t=last_pace, reduction_factor=search.reduction_factor)
