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

from orchestrator.plan import head_control
from orchestrator.plan.defaults import with_section
from orchestrator.run.activities import ranks_text
from orchestrator.run.records import JudgedTrial, RunOutcome, judge_trials, read_finished_sweep, read_sweep, write_outcome
from orchestrator.runtime.assignments import Orders
from orchestrator.runtime.cluster import fetch, joins
from orchestrator.runtime.exchange import Exchange
from orchestrator.runtime.failures import in_plain_words
from orchestrator.runtime.finish import finish
from orchestrator.runtime.follow_up_trials import follow_up_trials, train_follow_ups
from orchestrator.runtime.hang_detection import HangTimeouts
from orchestrator.runtime.measurements import measured_in_a_gang
from orchestrator.runtime.outcome import summarise
from orchestrator.runtime.prepare import Prepared, base_of, open_run, prepare
from orchestrator.runtime.run_progress import ProgressReporter, Watcher
from orchestrator.runtime.search import evaluate_base, run_search, submit, wait_for
from orchestrator.spec import LoadedSpec
from orchestrator.transfer.records import SweepResult
from orchestrator.transfer.run_view import RunView


def run_sweep(loaded: LoadedSpec, *, view: RunView, address: str | None = None, output: Path | None = None) -> RunOutcome:
    """Run a sweep to its end, continue an interrupted one, or show a finished one.

    Args:
        view: Receives progress and events.
        address: Ray to run on; RAY_ADDRESS or a private one without it.
        output: Folder for runs; overrides the spec's `output`.

    Raises:
        OrchestratorError: whatever stops the run, see errors.py; what was done is on disk.
    """
    loaded = with_section(loaded, "sweep", lambda: base_of(loaded, output).anatomy(loaded.spec.task))
    started_at = time.time()
    with ExitStack() as stack:
        run = stack.enter_context(open_run(loaded, "sweep", output, view))
        stack.enter_context(in_plain_words(run.path))
        finished, earlier = read_finished_sweep(run, loaded.spec), read_sweep(run.path)
        is_finished = finished is not None and run.plan.exists()
        view = stack.enter_context(ProgressReporter(view, None if is_finished else run.path))
        prepared = prepare(loaded, "sweep", run, view, None if is_finished else joins(stack, address, run.path))
        if finished is not None:
            return finished
        view.start(
            name=prepared.spec.name,
            metric=prepared.scoring.metric,
            higher_is_better=prepared.scoring.higher_is_better,
            max_forgetting=prepared.scoring.max_forgetting,
            num_trials=prepared.sweep_plan.search.num_trials,
        )
        prepared, sweep = _search(prepared, view, started_at, earlier)
        trials = judge_trials(run.ledger, prepared.scoring)  # the exchange may have written until it was closed
        return write_outcome(finish(prepared, sweep, trials, view))


def _search(
    prepared: Prepared, view: ProgressReporter, started_at: float, earlier: SweepResult | None
) -> tuple[Prepared, SweepResult]:
    """Evaluate the base model, measure, search, summarise, and train what follows the promoted trial; then release the gangs.

    Args:
        earlier: The summary of earlier submissions.

    Returns:
        The run with its policies by score resolved, and what was found.
    """
    with _exchange(prepared) as exchange, Watcher(exchange, view, prepared.run) as watcher, view.watching(watcher.look):
        plan, seed, ledger = prepared.sweep_plan, prepared.spec.train.seed, prepared.run.ledger
        view.phase("gangs", f"{plan.num_gangs} worker group(s) of {ranks_text(plan.execution.ranks)}")
        evaluate_base(plan, prepared.anatomy, exchange, seed)
        ledger.refresh()  # the exchange, another process, has written the base model's scores
        prepared = measured_in_a_gang(prepared, exchange, view)
        plan = prepared.sweep_plan
        view.phase("search", f"{plan.search.num_trials} trials")
        stops = plan.search.rung_steps if plan.search.patience is not None else plan.search.rung_steps[-1:]
        head = submit(exchange, *head_control(plan, prepared.anatomy, prepared.spec, seed), stops)
        recorded = [entry for entry in ledger.entries() if entry.trial.control is None]
        run_search(plan, exchange, recorded, prepared.run.path / "tune", seed)
        wait_for(exchange, "head", head)
        figures = fetch(exchange.figures.remote())

        def found() -> tuple[SweepResult, JudgedTrial | None]:
            """Judge and summarise what is on disk now; return the summary, also written, and the promoted trial."""
            hours, trials = fetch(exchange.hours.remote()), judge_trials(ledger, prepared.scoring)
            summary = summarise(prepared, trials, figures, started_at, earlier, hours)
            return summary, trials[summary.winner_id] if summary.winner_id is not None else None

        sweep, promoted = found()
        follow_ups = follow_up_trials(prepared, promoted) if promoted is not None else []
        if follow_ups:
            train_follow_ups(prepared, exchange, follow_ups, view)
            sweep, _ = found()
        _emit_findings(prepared, view, sweep, earlier)
    return prepared, sweep


def _emit_findings(prepared: Prepared, view: RunView, sweep: SweepResult, earlier: SweepResult | None) -> None:
    """Report the findings of the search other than its trials.

    Args:
        earlier: The summary of earlier submissions.
    """
    if sweep.learning_curve is not None:
        _emit(prepared, view, "learning_curve", sweep.learning_curve.sentence)
    if sweep.no_learning_curve:
        _emit(prepared, view, "learning_curve_left_out", sweep.no_learning_curve)
    if earlier is not None and earlier.promoted_by_hand and earlier.winner_id != sweep.winner_id:
        instead = f"{earlier.winner_id}, which was promoted by hand before the search continued"
        _emit(prepared, view, "promoted_by_rule", f"{sweep.winner_id or 'nothing'} is promoted by the rule, instead of {instead}")
    if sweep.ended_by_hours:
        _emit(prepared, view, "ended_by_hours", sweep.ended_by_hours)


def _emit(prepared: Prepared, view: RunView, kind: str, message: str) -> None:
    view.event(kind, message)
    prepared.run.event(kind, message=message)


@contextmanager
def _exchange(prepared: Prepared) -> Iterator[Any]:
    """Start the exchange actor with its gangs on the driver's own node; close them in order whatever happens."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    orders = Orders(
        plan=prepared.sweep_plan,
        anatomy=prepared.anatomy,
        settings=prepared.settings,
        data=prepared.data_paths,
        scoring=prepared.scoring,
        trials_folder=str(prepared.run.trials),
        num_gangs=prepared.plan.num_gangs,
        hours_file=str(prepared.run.hours),
        max_gpu_hours=prepared.spec.resources.max_gpu_hours,
        timeouts=HangTimeouts.from_environment(),
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Exchange)
    # Every trial waits in a call of its own, and the watcher and the driver call meanwhile: none must queue behind another.
    exchange = actor.options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(orders)
    try:
        fetch(exchange.open.remote())
        yield exchange
    finally:
        with contextlib.suppress(RayError):  # the first error is the one to report
            fetch(exchange.close.remote(), 60)
        ray.kill(exchange)
