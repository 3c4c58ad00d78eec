"""Scoring the blocks before the search, once in a run's life: layer_scores.json says what was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import TrainingError
from orchestrator.plan import probe_trial, with_scores
from orchestrator.plan.cost.choices import planned_options
from orchestrator.plan.results import RungResult
from orchestrator.plan.scored import LayerScores
from orchestrator.plan.values import Assignment, BaseLoad, ExecutionPlan, RunPlan
from orchestrator.runtime.cluster import fetch, rank_resources, worker_env
from orchestrator.runtime.hours import metered
from orchestrator.runtime.measuring import Measure, measured
from orchestrator.runtime.minding import Minder, in_a_minded_process, run_task
from orchestrator.runtime.prepare import Prepared, read_scores
from orchestrator.runtime.vigil import Patience
from orchestrator.spec import parse_policy
from orchestrator.store import write_json
from orchestrator.transfer.view import RunView


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
