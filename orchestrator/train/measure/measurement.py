"""The measurements that a gang makes before the search, by kind: block scores, domain shift, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from orchestrator.anatomy import LayerSelection, select
from orchestrator.data import TokenizedSet
from orchestrator.train.adapters.branch import Branch, open_branch
from orchestrator.train.batches import RowPlan, step_inputs
from orchestrator.train.building import build_engine
from orchestrator.train.engines.construction import forward_ready, weight_keeper
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.integrity import prove_frozen
from orchestrator.train.learned import LearnedSets
from orchestrator.train.measure.domain_shift import measure_shift
from orchestrator.train.measure.layer_scores import score_blocks
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.compiled import LOOKED_AT, time_compiled
from orchestrator.train.model.objective import objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.train.trunk.library import TrunkLibrary
from orchestrator.work.assignment import Measurement, MeasureShift, ScoreBlocks, TimeCompiling, TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.measurements import CompileTimes, DomainShift, LayerScores

Found = LayerScores | DomainShift | CompileTimes


@dataclass(frozen=True)
class Bench:
    """What a rank measures with. Every rank has one and makes the same calls in the same order."""

    base: LoadedBase
    execution: ExecutionPlan
    """How the work is run now: smaller than planned where memory ran out."""
    ranks: Ranks
    load_set: Callable[[str], TokenizedSet]
    trunk: TrunkLibrary
    fingerprint: Mapping[str, str]
    """Hashes of the base's tensors."""

    @property
    def rows(self) -> RowPlan:
        """How documents share rows."""
        return RowPlan.of(self.execution, self.ranks.rank, classify=self.base.load.task == "classify")

    def untouched(self) -> LayerSelection:
        """Return the selection under which nothing of the base learns."""
        load = self.base.load
        return select(self.base.anatomy, "none", "full", None, task=load.task, num_classes=load.num_classes)

    def open(self, selection: LayerSelection, *, lora_alpha: int, seed: int) -> Branch:
        """Open a branch of the base, to be closed by its context."""
        return open_branch(self.base, selection, lora_alpha=lora_alpha, seed=seed, keeper=weight_keeper(self.execution))


def measure_on(work: Measurement, bench: Bench) -> Found:
    """Measure on this bench what the work asks for; the base is left as it was.

    Raises:
        TrainingError: the measurement failed, on every rank alike.
    """
    torch.manual_seed(work.seed)
    match work:
        case ScoreBlocks():
            return _block_scores(work, bench)
        case MeasureShift():
            return _domain_shift(work, bench)
        case TimeCompiling():
            return _compile_times(work, bench)


def _block_scores(work: ScoreBlocks, bench: Bench) -> LayerScores:
    """Every rank has the whole base and computes the same."""
    selection = bench.untouched()
    with bench.open(selection, lora_alpha=0, seed=work.seed) as branch:
        objective = objective_of(bench.base, branch.head(), selection.cut)
        data = bench.load_set(work.data.train)
        found = score_blocks(bench.base, objective, data, work.plan, bench.execution, work.seed)
        prove_frozen(branch.model, bench.fingerprint, bench.ranks)
    return found


def _domain_shift(work: MeasureShift, bench: Bench) -> DomainShift:
    data, selection = work.data, bench.untouched()
    assert data.retain is not None, "planned where there is a retention set"
    with ExitStack() as stack:
        branch = stack.enter_context(bench.open(selection, lora_alpha=0, seed=work.seed))
        objective = objective_of(bench.base, branch.head(), selection.cut)
        stack.enter_context(forward_ready(objective, bench.execution))
        builder = TrunkBuilder(bench.base, objective, bench.rows, bench.ranks, is_partitioned(bench.execution))
        target, retention = ((path, bench.load_set(path)) for path in (data.train, data.retain))
        return measure_shift(work.plan, target, retention, bench.trunk, builder, work.seed)


def _compile_times(work: TimeCompiling, bench: Bench) -> CompileTimes:
    """Time the trial's own first micro-batches in its own engine, which takes no step."""
    trial, selection, execution = work.trial, work.selection, bench.execution
    rung = TrainRung(
        context=work.context, execution=execution, trial=trial, selection=selection, folder="", stop_step=trial.total_steps
    )
    sets = LearnedSets(rung, bench.load_set, bench.trunk)
    with ExitStack() as stack:
        branch = stack.enter_context(bench.open(selection, lora_alpha=trial.lora_alpha, seed=trial.seed))
        objective = objective_of(bench.base, branch.head(), selection.cut)
        if execution.checkpointing:
            blocks = branch.model.get_submodule(bench.base.anatomy.blocks_module)
            stack.enter_context(recomputed(list(blocks.children())[selection.cut :]))
        engine = build_engine(objective, branch, rung, execution, bench.ranks, bench.rows, sets, bench.fingerprint)
        stack.callback(engine.close)
        steps = step_inputs(sets.steps, replace(bench.rows, one_shape=True), 0, LOOKED_AT, sets.states)
        return time_compiled(bench.base, engine, selection.cut, execution, steps)
