"""What a gang measures before the search, outside the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import TrainingError
from orchestrator.plan import compile_trial, probe_trial, shift_trial, with_scores
from orchestrator.plan.cost.choices import planned_options
from orchestrator.plan.measurements import NO_RETENTION_SET, choice_of, standing_choice, with_choice
from orchestrator.plan.schedule import has_few_examples
from orchestrator.plan.values import RunPlan
from orchestrator.run.hours import metered
from orchestrator.run.ledger import Ledger
from orchestrator.run.records import base_result
from orchestrator.runtime.cluster import fetch, rank_resources, worker_env
from orchestrator.runtime.hang_detection import Patience
from orchestrator.runtime.prepare import Prepared, read_choice, read_scores
from orchestrator.runtime.task_supervision import Minder, in_a_minded_process, run_task
from orchestrator.spec import parse_policy
from orchestrator.store import read_record, write_json
from orchestrator.transfer.domain_shift import Advice, advise
from orchestrator.transfer.view import RunView
from orchestrator.work.assignment import Assignment
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.measurements import CompileChoice, CompilePlan, CompileTimes, DomainShift, LayerScores
from orchestrator.work.results import RungResult

Measure = Callable[[Assignment], RungResult | None]
"""Has an assignment run somewhere."""


def measured(prepared: Prepared, assignment: Assignment, measure: Measure) -> RungResult:
    """What came of it; its notes are in the run's record."""
    result = measure(assignment)
    assert result is not None, "a control's work is never held back"
    trial_id = assignment.trial.trial_id
    for note in result.notes:
        prepared.run.event("trial_note", message=f"{trial_id}: {note}", trial_id=trial_id)
    return result


def scored_in_a_gang(prepared: Prepared, exchange: Any, view: RunView) -> Prepared:
    """The run with its blocks scored by one of its gangs, and its policies by score resolved, there and in the exchange.

    Raises:
        TrainingError: the blocks could not be scored, and a policy needs it.
    """
    scored = _scored(prepared, prepared.plan.execution, view, lambda assignment: fetch(exchange.probe.remote(assignment)))
    if scored is not prepared:
        fetch(exchange.replan.remote(scored.plan))
    return scored


def scored_alone(prepared: Prepared, view: RunView) -> Prepared:
    """Likewise for the one-trial job, which has no gang yet: in a process of its own, with one rank's resources.

    Raises:
        TrainingError: the blocks could not be scored, and a policy needs it.
    """
    whole = prepared.plan.refit_execution
    execution = whole.model_copy(update={"ranks": 1, "executor": "torch", "zero_stage": 0, "offload": "none"})
    resources = rank_resources(execution)

    def score(assignment: Assignment) -> RungResult:
        remote: Any = ray.remote(max_calls=1)(in_a_minded_process)  # the base is gone when it ends
        task = remote.options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_retries=0,
            runtime_env={"env_vars": worker_env(execution)},
        )
        patience = Patience.from_environment().for_base(2 * prepared.anatomy.num_parameters())
        with metered(prepared.run.hours, 1), Minder(prepared.run, patience) as minder:
            given = (prepared.plan.base, prepared.anatomy, assignment)
            return run_task(minder, "scoring the blocks", task, score_in_this_process, *given)

    return _scored(prepared, execution, view, score)


def score_in_this_process(base: BaseLoad, anatomy: ModelAnatomy, assignment: Assignment) -> RungResult:
    """Load the base, score its blocks."""
    from orchestrator.train import TrainHost

    host = TrainHost.create(base, anatomy, assignment.execution, 0, 1, init_method=None)
    try:
        return host.run(assignment)
    finally:
        host.close()


def _scored(prepared: Prepared, execution: ExecutionPlan, view: RunView, score: Measure) -> Prepared:
    probe = prepared.plan.probe
    if probe is None or read_scores(prepared.run) is not None:
        return prepared  # an earlier submission scored them: the plan knows
    view.phase("probe", f"{probe.num_batches} x {probe.rows} rows")
    found = _run(prepared, execution, score)
    if found.failed and probe.required:
        raise TrainingError(
            f"the blocks could not be scored: {found.failed}",
            where=str(prepared.run.path),
            remedy="fix the reported error and submit the same spec again, or name blocks instead of `top:` under another `name`",
        )
    write_json(prepared.run.layer_scores, found)
    plan = with_scores(prepared.plan, prepared.spec, prepared.anatomy, found)
    write_json(prepared.run.plan, plan)
    kind = "blocks_not_scored" if found.failed else "blocks_scored"
    message = f"the search continues without scores: {found.failed}" if found.failed else _sentence(found, plan)
    view.event(kind, message)
    prepared.run.event(kind, message=message, **found.model_dump(mode="json", exclude={"failed"}))
    return replace(prepared, plan=plan)


def _run(prepared: Prepared, execution: ExecutionPlan, score: Measure) -> LayerScores:
    """What was found, or why there is nothing."""
    trial, nothing = probe_trial(prepared.plan, prepared.anatomy, prepared.spec.train.seed)
    probe = prepared.plan.probe
    assignment = prepared.assignment(trial, nothing, folder=prepared.run.path, stop_step=0, execution=execution, probe=probe)
    result = measured(prepared, assignment, score)
    return result.layer_scores or LayerScores(failed=result.reason)


def _sentence(found: LayerScores, plan: RunPlan) -> str:
    """`4 micro-batches of 60 documents, 1810 tokens, in 0.3 s: 2.1% of ... operations; top:0.5 is blocks 2, 3`."""
    batches = "1 micro-batch" if found.num_batches == 1 else f"{found.num_batches} micro-batches"
    said = (
        f"{batches} of {found.num_documents} documents, {found.num_tokens} tokens, in "
        f"{found.seconds:.1f} s: {found.share_of_trial:.1%} of the cheapest trial's operations"
    )
    options = planned_options(plan)
    chosen = {option.layers: option.selection.blocks for option in options if parse_policy(option.layers).kind == "top"}
    return "; ".join([said, *(f"{layers} is blocks {', '.join(map(str, blocks))}" for layers, blocks in chosen.items())])


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


def advised_by_shift(prepared: Prepared, exchange: Any, view: RunView) -> Prepared:
    """The run with its first proposals ordered by what was measured. Without a retention set nothing is measured: few examples
    order them all the same, and more change nothing.
    """
    plan = prepared.plan
    file = prepared.run.domain_shift
    if plan.search is None or (plan.shift is None and not has_few_examples(plan.data)):
        return prepared
    known = read_record(file, DomainShift) if file.exists() else None
    found = known or _measured(prepared, lambda assignment: fetch(exchange.probe.remote(assignment)))
    advice = advice_of(prepared, found)
    if known is None:
        write_json(file, found)
        view.event("domain_shift", advice.sentence)
        prepared.run.event("domain_shift", message=advice.sentence, **found.model_dump(mode="json"))
    search = plan.search.model_copy(update={"prior": advice.kind})
    plan = plan.model_copy(update={"search": search})
    write_json(prepared.run.plan, plan)
    fetch(exchange.replan.remote(plan))
    return replace(prepared, plan=plan)


def advice_of(prepared: Prepared, found: DomainShift) -> Advice:
    base = base_result(Ledger(prepared.run.trials))
    return advise(
        [block.distance for block in found.blocks],
        target_loss=base.eval_loss if base is not None else None,
        retention_loss=base.retain_loss if base is not None else None,
        num_documents=prepared.plan.data.train_documents,
        failed=found.failed,
    )


def _measured(prepared: Prepared, measure: Measure) -> DomainShift:
    if prepared.plan.shift is None:
        return DomainShift(failed=NO_RETENTION_SET)
    trial, nothing = shift_trial(prepared.plan, prepared.anatomy, prepared.spec.train.seed)
    assignment = prepared.assignment(trial, nothing, folder=prepared.run.path, stop_step=0, shift=prepared.plan.shift)
    result = measured(prepared, assignment, measure)
    return result.domain_shift or DomainShift(failed=result.reason)
