"""The measurements that a gang makes before the search, by kind: block scores, domain shift, compiled blocks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch

from orchestrator.anatomy import select
from orchestrator.train.adapters.branch import Branch, open_branch
from orchestrator.train.batches import step_inputs
from orchestrator.train.context import HostContext
from orchestrator.train.engines.construction import forward_ready, weight_keeper
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.integrity import prove_frozen
from orchestrator.train.measure.domain_shift import measure_shift
from orchestrator.train.measure.layer_scores import score_blocks
from orchestrator.train.model.compiled import LOOKED_AT, time_compiled
from orchestrator.train.model.objective import objective_of
from orchestrator.train.session import open_branches, prepared_objective
from orchestrator.train.training_sets import TrainingSets
from orchestrator.train.trial_engine import build_engine
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.work.assignment import Measurement, MeasureShift, ScoreBlocks, TimeCompiling, TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.measurements import CompileTimes, DomainShift, LayerScores

Found = LayerScores | DomainShift | CompileTimes


def measure(work: Measurement, context: HostContext, execution: ExecutionPlan) -> Found:
    """Make the requested measurement; the base is left as it was.

    Args:
        work: What to measure.
        context: What this rank holds.
        execution: How the model is run; smaller than planned where memory ran out.

    Raises:
        TrainingError: the measurement failed, on every rank.
    """
    torch.manual_seed(work.seed)
    match work:
        case ScoreBlocks():
            return _block_scores(work, context, execution)
        case MeasureShift():
            return _domain_shift(work, context, execution)
        case TimeCompiling():
            return _compile_times(work, context, execution)


def _base_branch(context: HostContext, seed: int, execution: ExecutionPlan) -> Branch:
    """Open a branch in which nothing is trainable, to be closed by its context."""
    load = context.base.load
    selection = select(context.base.anatomy, "none", "full", None, task=load.task, num_classes=load.num_classes)
    return open_branch(context.base, selection, lora_alpha=0, seed=seed, keeper=weight_keeper(execution))


def _block_scores(work: ScoreBlocks, context: HostContext, execution: ExecutionPlan) -> LayerScores:
    """Score the blocks: every rank has the whole base and computes the same."""
    with _base_branch(context, work.seed, execution) as branch:
        objective = objective_of(context.base, branch.head(), branch.selection.cut)
        data = context.sets.load(work.data.train)
        found = score_blocks(context.base, objective, data, work.plan, execution, work.seed)
        prove_frozen(branch.model, context.fingerprint, context.ranks)
    return found


def _domain_shift(work: MeasureShift, context: HostContext, execution: ExecutionPlan) -> DomainShift:
    data, partitioned = work.data, is_partitioned(execution)
    assert data.retain is not None, "planned where there is a retention set"
    with ExitStack() as stack:
        branch = stack.enter_context(_base_branch(context, work.seed, execution))
        objective = objective_of(context.base, branch.head(), branch.selection.cut)
        stack.enter_context(forward_ready(objective, execution))
        builder = TrunkBuilder(context.base, objective, context.rows(execution), context.ranks, partitioned)
        target, retention = ((path, context.sets.load(path)) for path in (data.train, data.retain))
        return measure_shift(work.plan, target, retention, context.trunk, builder, work.seed)


def _compile_times(work: TimeCompiling, context: HostContext, execution: ExecutionPlan) -> CompileTimes:
    """Time the trial's own first micro-batches in its own engine, which takes no step."""
    trial, selection = work.trial, work.selection
    rung = TrainRung(
        context=work.context, execution=execution, trial=trial, selection=selection, folder="", stop_step=trial.total_steps
    )
    sets = TrainingSets(rung, context.sets.load, context.trunk)
    with ExitStack() as stack:
        (branch,) = open_branches(context.base, [rung], execution, stack)
        objective = prepared_objective(context.base, branch, selection.cut, execution, stack)
        engine = build_engine(context, execution, sets, objective, branch)
        stack.callback(engine.close)
        rows = replace(context.rows(execution), one_shape=True)
        steps = step_inputs(sets.steps, rows, 0, LOOKED_AT, sets.states)
        return time_compiled(context.base, engine, selection.cut, execution, steps)
