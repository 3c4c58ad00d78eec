"""The measurements that a gang makes before the search, by kind: block scores, domain shift, compiled blocks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from orchestrator.anatomy import select
from orchestrator.data import TokenizedSet
from orchestrator.data.rng import FEATURES, generator
from orchestrator.train.adapters.branch import Branch, open_branch
from orchestrator.train.batches import step_inputs
from orchestrator.train.context import HostContext
from orchestrator.train.engines.construction import forward_ready, weight_keeper
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.integrity import prove_frozen
from orchestrator.train.measure.layer_scores import score_blocks
from orchestrator.train.model.compiled import LOOKED_AT, time_compiled
from orchestrator.train.model.objective import objective_of
from orchestrator.train.session import open_branches, prepared_objective
from orchestrator.train.training_sets import TrainingSets
from orchestrator.train.trial_engine import build_engine
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.train.trunk.chunks import MemoryChunks
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.transfer.domain_shift import proxy_a_distance
from orchestrator.work.assignment import Measurement, MeasureShift, ScoreBlocks, TimeCompiling, TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.measurements import BlockShift, CompileTimes, DomainShift, LayerScores, ShiftPlan

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


def measure_shift(
    plan: ShiftPlan,
    target: tuple[str, TokenizedSet],
    retention: tuple[str, TokenizedSet],
    trunk: TrunkLibrary,
    builder: TrunkBuilder,
    seed: int,
) -> DomainShift:
    """Measure the distance of two sets at each cut. Every rank gets the same answer.

    Args:
        target: Path and set, as the trunk knows it.
        retention: The retention set, in the same form.
        trunk: The stored activations, which are read at every cut of the plan.
        builder: Computes the other activations, from the base without a branch.
        seed: Seed of the choice of documents and of the folds.
    """
    started = time.perf_counter()
    sides = [_features(plan, path, data, trunk, builder, seed) for path, data in (target, retention)]
    try:
        blocks = tuple(_block(cut, sides[0][cut], sides[1][cut], seed) for cut in plan.cuts)
    except ValueError as error:
        return DomainShift(failed=str(error))
    return DomainShift(
        blocks=blocks,
        target_documents=len(sides[0][plan.cuts[0]]),
        retention_documents=len(sides[1][plan.cuts[0]]),
        seconds=time.perf_counter() - started,
    )


def _block(cut: int, target: np.ndarray, retention: np.ndarray, seed: int) -> BlockShift:
    distance, low, high = proxy_a_distance(target, retention, seed)
    return BlockShift(cut=cut, distance=distance, low=low, high=high)


def _features(
    plan: ShiftPlan, path: str, data: TokenizedSet, trunk: TrunkLibrary, builder: TrunkBuilder, seed: int
) -> dict[int, np.ndarray]:
    """Return float64[n, H] by cut, a row for each drawn document."""
    chosen = np.sort(generator(seed, FEATURES).permutation(len(data))[: plan.num_documents])
    stored = {cut: trunk.states(path, cut) for cut in plan.cuts}
    known: Mapping[int, TrunkStates] = {cut: states for cut, states in stored.items() if states is not None}
    if len(known) < len(stored):
        known = builder.build(data.select(chosen), {cut: MemoryChunks() for cut in plan.cuts})
        # The builder numbers the selected documents from 0.
        chosen = np.arange(len(chosen))
    return {
        cut: np.stack([states.document(int(index)).double().mean(0).numpy() for index in chosen]) for cut, states in known.items()
    }
