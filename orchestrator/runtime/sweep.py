"""The sweep: plan, controls, search, promotion, refit, bundle, verdict."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.anatomy import LayerSelection
from orchestrator.errors import TrainingError
from orchestrator.plan import head_control, none_control, scratch_control, shuffled_control
from orchestrator.plan.values import TrialSpec
from orchestrator.runtime.assignments import Answer, Orders
from orchestrator.runtime.budget import selection_of
from orchestrator.runtime.cluster import fetch
from orchestrator.runtime.compiling import compiled_where_it_pays
from orchestrator.runtime.curve import curve_trials
from orchestrator.runtime.domain import advised_by_shift
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.finish import finish
from orchestrator.runtime.hours import may_go_on, read_hours
from orchestrator.runtime.joining import joins
from orchestrator.runtime.ledger import Ledger
from orchestrator.runtime.outcome import LATE, RunOutcome, read_outcome, read_sweep, summarise, write_outcome
from orchestrator.runtime.prepare import Prepared, open_run, prepare
from orchestrator.runtime.probing import scored_in_a_gang
from orchestrator.runtime.search import run_search
from orchestrator.runtime.watch import Watcher
from orchestrator.spec import LoadedSpec, require_section
from orchestrator.store import RunDirectory
from orchestrator.transfer.records import SweepResult
from orchestrator.transfer.view import RunView


def run_sweep(loaded: LoadedSpec, *, view: RunView, address: str | None = None, output: Path | None = None) -> RunOutcome:
    """Run a sweep to its end, or go on with one that was interrupted, or show one that is finished.

    Args:
        view: Whoever watches.
        address: Ray to run on; RAY_ADDRESS or a private one without it.
        output: Folder of the runs, instead of the spec's.

    Raises:
        OrchestratorError: whatever stops the run, see errors.py; what was done is on disk.
    """
    require_section(loaded, "sweep")
    started_at = time.time()
    with ExitStack() as stack:
        run = stack.enter_context(open_run(loaded, "sweep", output, view))
        finished = _finished(run, loaded)
        prepared = prepare(loaded, "sweep", run, view, None if finished else joins(stack, address, run.path))
        if finished is not None:
            return finished
        stack.callback(view.close)
        prepared, sweep = _search(prepared, view, started_at)
        outcome = finish(prepared, sweep, view)
        return write_outcome(outcome)


def _finished(run: RunDirectory, loaded: LoadedSpec) -> RunOutcome | None:
    """The outcome, where this very sweep has come to its end, and neither more trials nor more hours are given."""
    assert loaded.spec.search is not None
    outcome = read_outcome(run.path)
    if outcome is None:
        return None
    ended, refit = outcome.sweep.ended_by_hours, outcome.transfer.refit
    if ended or (refit is not None and refit.left_out_for_hours):
        if may_go_on(outcome.sweep.max_gpu_hours, read_hours(run.hours), loaded.spec.resources.max_gpu_hours):
            return None
        if ended:
            return outcome
    return outcome if len(outcome.sweep.searched) >= loaded.spec.search.num_trials else None


def _search(prepared: Prepared, view: RunView, started_at: float) -> tuple[Prepared, SweepResult]:
    """Controls, the blocks' scores, trials, promotion, and the shuffled control of the promoted trial.

    The gangs are released at the end.

    Returns:
        The run with its policies by score resolved, and what was found.
    """
    spec, plan = prepared.spec, prepared.plan
    assert spec.search is not None
    assert plan.search is not None
    view.start(
        name=spec.name,
        metric=prepared.scoring.metric,
        higher_is_better=prepared.scoring.higher_is_better,
        max_forgetting=prepared.scoring.max_forgetting,
        num_trials=plan.search.num_trials,
    )
    seed = spec.train.seed
    earlier = read_sweep(prepared.run.path)
    with _exchange(prepared) as exchange, Watcher(exchange, view, prepared.run):
        view.phase("gangs", f"{plan.num_gangs} x {plan.execution.ranks} rank(s)")
        base = _advance(exchange, *none_control(plan, prepared.anatomy, seed), stop_step=0)
        untouched = _wait(exchange, "none", base)
        if untouched.state == "failed":
            raise TrainingError(
                f"the untouched base could not be evaluated: {untouched.reason}",
                remedy="mend what it says and submit the same spec again: it is evaluated anew",
            )
        prepared = compiled_where_it_pays(scored_in_a_gang(prepared, exchange, view), exchange, view)
        prepared = advised_by_shift(prepared, exchange, view)
        plan = prepared.plan
        assert plan.search is not None
        view.phase("search", f"{plan.search.num_trials} trials")
        last_step = plan.search.rung_steps[-1]
        head = _advance(exchange, *head_control(plan, prepared.anatomy, spec, seed), stop_step=last_step)
        recorded = [entry for entry in Ledger(prepared.run.trials).entries() if entry.trial.control is None]
        run_search(plan, exchange, recorded, prepared.run.path / "tune", seed)
        _wait(exchange, "head", head)
        figures, hours = fetch(exchange.figures.remote()), fetch(exchange.hours.remote())
        sweep = summarise(prepared, Ledger(prepared.run.trials), figures, started_at, earlier, hours)
        if sweep.winner_id is not None and (set(LATE) & set(spec.search.controls) or plan.search.curve_shares):
            _run_beside(prepared, exchange, sweep.winner_id, view)
            hours = fetch(exchange.hours.remote())
            sweep = summarise(prepared, Ledger(prepared.run.trials), figures, started_at, earlier, hours)
        if sweep.learning_curve is not None:
            _tell(prepared, view, "learning_curve", sweep.learning_curve.sentence)
        if sweep.no_learning_curve:
            _tell(prepared, view, "learning_curve_left_out", sweep.no_learning_curve)
        if sweep.ended_by_hours:
            _tell(prepared, view, "ended_by_hours", sweep.ended_by_hours)
    return prepared, sweep


def _run_beside(prepared: Prepared, exchange: Any, winner_id: str, view: RunView) -> None:
    """What is trained once the winner is known: the controls that repeat it, and its learning curve."""
    search, plan = prepared.spec.search, prepared.plan
    assert search is not None
    assert plan.search is not None
    if "shuffled" in search.controls:
        _run_shuffled(prepared, exchange, winner_id, view)
    if "scratch" in search.controls and plan.scratch_memory is not None:
        _run_scratch(prepared, exchange, winner_id, view)
    if plan.search.curve_shares:
        _run_curve(prepared, exchange, winner_id, view)


def _run_shuffled(prepared: Prepared, exchange: Any, winner_id: str, view: RunView) -> None:
    """Train the promoted trial once more, to the full budget that its bundle has, on answers permuted among the prompts."""
    winner = Ledger(prepared.run.trials).get(winner_id)
    assert winner is not None
    _run_late(prepared, exchange, shuffled_control(winner.trial), selection_of(prepared, winner), view)


def _run_scratch(prepared: Prepared, exchange: Any, winner_id: str, view: RunView) -> None:
    """Train random weights on the promoted trial's documents, to the full budget that its bundle has."""
    winner = Ledger(prepared.run.trials).get(winner_id)
    assert winner is not None
    trial, selection = scratch_control(prepared.plan, prepared.anatomy, prepared.spec, winner.trial)
    _run_late(prepared, exchange, trial, selection, view)


def _run_late(prepared: Prepared, exchange: Any, trial: TrialSpec, selection: LayerSelection, view: RunView) -> None:
    call = _advance(exchange, trial, selection, stop_step=trial.total_steps)
    answer = _wait(exchange, trial.trial_id, call)
    if answer.state == "stopped":
        _tell(prepared, view, "control_left_out", f"{trial.trial_id}: {answer.reason}")


def _run_curve(prepared: Prepared, exchange: Any, winner_id: str, view: RunView) -> None:
    """Train the promoted trial on shares of its data, as many at once as there are gangs; the ledger knows what came of it."""
    winner = Ledger(prepared.run.trials).get(winner_id)
    assert winner is not None
    trials, selection = curve_trials(prepared, winner), selection_of(prepared, winner)
    view.phase("learning curve", f"{winner_id} on {len(trials)} shares of the data")
    calls = [(trial.trial_id, _advance(exchange, trial, selection, stop_step=trial.total_steps)) for trial in trials]
    for trial_id, call in calls:
        _wait(exchange, trial_id, call)


def _tell(prepared: Prepared, view: RunView, kind: str, message: str) -> None:
    view.event(kind, message)
    prepared.run.event(kind, message=message)


@contextmanager
def _exchange(prepared: Prepared) -> Iterator[Any]:
    """The exchange actor with its gangs, on the driver's own node; closed in order whatever happens."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    orders = Orders(
        plan=prepared.plan,
        anatomy=prepared.anatomy,
        settings=prepared.settings,
        data=prepared.data_paths,
        scoring=prepared.scoring,
        trials_folder=str(prepared.run.trials),
        num_gangs=prepared.plan.num_gangs,
        hours_file=str(prepared.run.hours),
        max_gpu_hours=prepared.spec.resources.max_gpu_hours,
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Exchange)
    exchange = actor.options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(orders)
    try:
        fetch(exchange.open.remote())
        yield exchange
    finally:
        with contextlib.suppress(RayError):  # what went wrong before is what the user must hear of
            fetch(exchange.close.remote(), 60)
        ray.kill(exchange)


def _advance(exchange: Any, trial: TrialSpec, selection: LayerSelection, *, stop_step: int) -> Any:
    """Hand a control in; it has one rung."""
    return exchange.advance.remote(trial, selection, None, 0, stop_step)


def _wait(exchange: Any, trial_id: str, call: Any) -> Answer:
    answer = fetch(call)
    fetch(exchange.finish.remote(trial_id, "failed" if answer.state == "failed" else "finished"))
    return answer
