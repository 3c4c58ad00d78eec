"""The one-trial job: no search, only a refit."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from orchestrator.plan import evaluate_base, make_trial, none_control
from orchestrator.plan.defaults import with_section
from orchestrator.run.activities import ranks_text
from orchestrator.run.records import RunOutcome, judge_trials, read_outcome, write_outcome
from orchestrator.runtime.cluster import joins
from orchestrator.runtime.failures import in_plain_words
from orchestrator.runtime.finish import finish
from orchestrator.runtime.measurements import scored_alone
from orchestrator.runtime.outcome import summarise
from orchestrator.runtime.prepare import Prepared, base_of, open_run, prepare
from orchestrator.runtime.refit import refit_assignment, run_refit
from orchestrator.runtime.run_progress import ProgressReporter
from orchestrator.spec import LoadedSpec
from orchestrator.transfer.records import SweepResult
from orchestrator.transfer.run_view import RunView


def run_finetune(loaded: LoadedSpec, *, view: RunView, address: str | None = None, output: Path | None = None) -> RunOutcome:
    """Train the spec's one trial to the full budget, fault-tolerant, and bundle it; continue an interrupted one.

    Raises:
        OrchestratorError: any error that stops the run, see errors.py; finished work is on disk.
    """
    loaded = with_section(loaded, "finetune", lambda: base_of(loaded, output).anatomy(loaded.spec.task))
    started_at = time.time()
    with ExitStack() as stack:
        run = stack.enter_context(open_run(loaded, "finetune", output, view))
        stack.enter_context(in_plain_words(run.path))
        known = read_outcome(run.path)
        is_finished = known is not None and run.plan.exists()
        view = stack.enter_context(ProgressReporter(view, None if is_finished else run.path))
        prepared = prepare(loaded, "finetune", run, view, None if is_finished else joins(stack, address, run.path))
        if known is not None:
            return known
        view.start(
            name=loaded.spec.name,
            metric="loss",
            higher_is_better=False,
            max_forgetting=prepared.scoring.max_forgetting,
            num_trials=1,
        )
        prepared = scored_alone(prepared, view)
        sweep = _train(prepared, view, started_at)
        return write_outcome(finish(prepared, sweep, judge_trials(run.ledger, prepared.scoring), view))


def _train(prepared: Prepared, view: RunView, started_at: float) -> SweepResult:
    """Score the base model and train the trial, in one worker group."""
    plan, seed = prepared.finetune_plan, prepared.spec.train.seed
    none, nothing = none_control(plan, prepared.anatomy, seed)
    trial = make_trial(plan, plan.finetune, plan.finetune.learning_rate_low, 0, seed)
    ledger = prepared.run.ledger
    ledger.register(none, None)
    ledger.register(trial, 0)
    view.phase("training", f"{trial.total_steps} steps on {ranks_text(plan.refit_execution.ranks)}")
    context, execution = prepared.work_context(plan.refit_execution), plan.refit_execution
    evaluation = evaluate_base(plan, context, none, nothing, str(ledger.folder("none")), execution)
    results = run_refit(prepared, [evaluation, refit_assignment(prepared, trial, plan.finetune.selection)])
    for result in results:
        ledger.add(result)
        ledger.end(result.trial_id, "finished")
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at)
    for record in sweep.trials:
        view.trial(record)
    return sweep
