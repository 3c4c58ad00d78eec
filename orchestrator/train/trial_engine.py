"""Build the engine of an open branch: parameter groups with their learning rates, and the anchor to the base."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from orchestrator.data import TokenizedSet
from orchestrator.plan.remedies import learning_groups
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.anchors import ANCHOR_CLASSES, Anchor, Anchored
from orchestrator.train.context import HostContext
from orchestrator.train.engines.construction import construct_engine
from orchestrator.train.engines.engine import Engine, layout_of
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.measure.fisher import fisher_information, importances, read_fisher, write_fisher
from orchestrator.train.ranks import Ranks
from orchestrator.train.training_sets import TrainingSets
from orchestrator.values import content_hash
from orchestrator.work.assignment import TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.remedies import AnchorPlan


def build_engine(
    context: HostContext, execution: ExecutionPlan, sets: TrainingSets, objective: nn.Module, branch: Branch
) -> Engine:
    """Build the engine that trains a branch, with the anchor of its trial.

    Args:
        context: The state of this rank.
        execution: How the trial is trained.
        sets: The trial's training sets, with the retention text that EWC measures importances on.
        objective: Objective of the branch.
        branch: Must still hold the base's weights: an anchor pulls towards the values that are there now.
    """
    trial, settings, ranks = sets.work.trial, sets.work.settings, context.ranks
    names = [name for name, _ in branch.learning_parameters()]
    groups = learning_groups(context.base.anatomy, sets.work.selection, trial.remedies, names)
    plan = trial.remedies.anchor
    weights: list[torch.Tensor] | None = None
    if plan is not None and plan.traits.uses_fisher:
        retention = sets.retention
        assert retention is not None, "EWC needs retention text"

        def measure() -> list[torch.Tensor]:
            measuring = construct_engine(objective, branch, groups, execution, settings, ranks, measuring=True)
            found = fisher_information(measuring, retention, context.rows(execution), ranks, trial.seed)
            measuring.close()
            return found

        file = Path(sets.work.data.train).parent / "fisher" / _fisher_name(context, execution, sets.work, retention)
        fisher = _fisher(file, measure, execution, ranks)
        held = {name for group in groups if group.anchored for name in group.names}
        num_weights = sum(getattr(p, "ds_numel", p.numel()) for name, p in branch.learning_parameters() if name in held)
        partitioned = execution.executor == "deepspeed" and execution.zero_stage > 0
        weights = importances(fisher, num_weights, ranks, partitioned=partitioned)
    engine = construct_engine(objective, branch, groups, execution, settings, ranks)
    if plan is not None:
        engine.set_anchor(_anchor(plan, engine, branch, weights))
    return engine


def _fisher(file: Path, measure: Callable[[], list[torch.Tensor]], execution: ExecutionPlan, ranks: Ranks) -> list[torch.Tensor]:
    """Return this rank's Fisher information, on the device of its masters; all ranks measure where one of them has none."""
    known = read_fisher(file, torch.device("cpu") if execution.offload != "none" else ranks.device)
    # Measuring is collective: if one rank does not have its file, all ranks measure.
    if all(ranks.gather(known is not None)):
        assert known is not None
        return known
    del known
    measured = measure()
    gc.collect()  # the engine that measured: its masters and gradients must be gone before the training engine has its own
    write_fisher(file, measured)
    return measured


def _anchor(plan: AnchorPlan, engine: Engine, branch: Branch, weights: Sequence[torch.Tensor] | None) -> Anchor:
    lora_rank = branch.selection.lora_rank or 1
    scale = branch.selection.adapter_kind.scale(branch.lora_alpha, lora_rank)
    adapters = engine.adapters if isinstance(engine, TorchEngine) else None
    return ANCHOR_CLASSES[plan.kind](Anchored(plan.strength, engine.anchored_masters, adapters, scale, lora_rank, weights))


def _fisher_name(context: HostContext, execution: ExecutionPlan, work: TrainRung, retention: TokenizedSet) -> str:
    """Return the file of a rank and selection: what it holds depends on the layout and on the learning-rate groups."""
    key = {
        "base": dict(context.fingerprint),
        "trainable": work.selection.trainable,
        "layer_decay": work.trial.remedies.layer_decay,
        "layout": layout_of(execution),
        "ranks": context.ranks.count,
        "retention": retention.sha256,
        "seed": work.trial.seed,
        "row_tokens": execution.row_tokens,
    }
    return f"{content_hash(key)[:16]}-rank{context.ranks.rank}.safetensors"
