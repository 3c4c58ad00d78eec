"""Whether the run's trials train with compiled blocks: settled before the first of them, once in a run's life (compile.json)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.errors import TrainingError
from orchestrator.plan import compile_trial
from orchestrator.plan.compilation import CompileChoice, CompilePlan, CompileTimes
from orchestrator.plan.compiling import choice_of, standing_choice, with_choice
from orchestrator.runtime.cluster import fetch
from orchestrator.runtime.ledger import Ledger
from orchestrator.runtime.measuring import Measure, measured
from orchestrator.runtime.prepare import Prepared, read_choice
from orchestrator.store import write_json
from orchestrator.transfer.view import RunView


def compiled_where_it_pays(prepared: Prepared, exchange: Any, view: RunView) -> Prepared:
    """The run with its choice made, there and in the exchange; one of its gangs measures where the plan says so.

    Raises:
        TrainingError: `resources.compile: on`, and the blocks cannot be compiled.
    """
    chosen = _chosen(prepared, view, lambda assignment: fetch(exchange.probe.remote(assignment)))
    if chosen.plan is not prepared.plan:
        fetch(exchange.replan.remote(chosen.plan))
    return chosen


def _chosen(prepared: Prepared, view: RunView, measure: Measure) -> Prepared:
    known, asked = read_choice(prepared.run), prepared.spec.resources.compile
    choice = standing_choice(asked, known) or _made(prepared, view, measure)
    if choice == known:
        return prepared  # the plan knows
    plan = with_choice(prepared.plan, choice)
    write_json(prepared.run.compile_choice, choice)
    write_json(prepared.run.plan, plan)
    kind = "blocks_compiled" if choice.compiled else "blocks_not_compiled"
    if choice.times is not None:
        view.event(kind, choice.reason)
    times = choice.times.model_dump(mode="json") if choice.times is not None else {}
    prepared.run.event(kind, message=choice.reason, **times)
    return replace(prepared, plan=plan)


def _made(prepared: Prepared, view: RunView, measure: Measure) -> CompileChoice:
    plan = prepared.plan.compiling
    if plan is None or plan.option is None:
        return CompileChoice(compiled=False, reason=plan.reason if plan is not None else "nothing is measured")
    begun = any(entry.trial.control is None for entry in Ledger(prepared.run.trials).entries())
    if begun and not plan.required:
        return CompileChoice(compiled=False, reason="the run's first trials were trained without")
    view.phase("compiling")
    choice = choice_of(plan, _times(prepared, plan, plan.option, measure))
    if plan.required and not choice.compiled:
        raise TrainingError(
            choice.reason,
            where=str(prepared.run.path),
            remedy="fix the reported error, or set resources.compile: auto, and submit again",
        )
    return choice


def _times(prepared: Prepared, plan: CompilePlan, option: int, measure: Measure) -> CompileTimes:
    """What was measured, or why there is nothing."""
    assert prepared.plan.search is not None
    selection = prepared.plan.search.options[option].selection
    trial = compile_trial(prepared.plan, option, prepared.spec.train.seed)
    assignment = prepared.assignment(trial, selection, folder=prepared.run.path, stop_step=0, compiling=plan)
    result = measured(prepared, assignment, measure)
    return result.compile_times or CompileTimes(failed=result.reason)
