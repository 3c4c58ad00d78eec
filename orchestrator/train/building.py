"""From an open branch to its engine: what learns in groups, at which rates, and what pulls it back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from orchestrator.data import TokenizedSet
from orchestrator.plan.remedies import learning_groups
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.anchors import Anchor, ElementAnchor, ProductAnchor
from orchestrator.train.batches import RowPlan
from orchestrator.train.engines.construction import construct_engine
from orchestrator.train.engines.engine import Engine, layout_of
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.learned import LearnedSets
from orchestrator.train.measure.fisher import fisher_information, importances, read_fisher, write_fisher
from orchestrator.train.ranks import Ranks
from orchestrator.values import content_hash
from orchestrator.work.assignment import TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.remedies import AnchorPlan


def build_engine(
    objective: nn.Module,
    branch: Branch,
    assignment: TrainRung,
    execution: ExecutionPlan,
    ranks: Ranks,
    rows: RowPlan,
    sets: LearnedSets,
    fingerprint: Mapping[str, str],
) -> Engine:
    """The trial's engine. The branch holds the base's own weights: what an anchor pulls to is what is there now.

    Args:
        sets: Hold the text that EWC weighs the weights by.
        fingerprint: Hashes of the base's tensors.
    """
    trial, settings = assignment.trial, assignment.settings
    names = [name for name, _ in branch.learning_parameters()]
    groups = learning_groups(branch.base.anatomy, assignment.selection, trial.remedies, names)
    plan = trial.remedies.anchor
    weights: list[torch.Tensor] | None = None
    if plan is not None and plan.kind == "ewc":
        retention = sets.retention
        assert retention is not None, "EWC needs retention text"

        def measure() -> list[torch.Tensor]:
            measuring = construct_engine(objective, branch, groups, execution, settings, ranks, measuring=True)
            found = fisher_information(measuring, retention, rows, ranks, trial.seed)
            measuring.close()
            return found

        file = Path(assignment.data.train).parent / "fisher" / _fisher_name(assignment, execution, ranks, retention, fingerprint)
        fisher = _fisher(file, measure, execution, ranks)
        held = {name for group in groups if group.anchored for name in group.names}
        num_weights = sum(getattr(p, "ds_numel", p.numel()) for name, p in branch.learning_parameters() if name in held)
        partitioned = execution.executor == "deepspeed" and execution.zero_stage > 0
        weights = importances(fisher, num_weights, ranks, partitioned=partitioned)
    engine = construct_engine(objective, branch, groups, execution, settings, ranks)
    if plan is not None:
        engine.hold(_anchor(plan, engine, branch, weights))
    return engine


def _fisher(file: Path, measure: Callable[[], list[torch.Tensor]], execution: ExecutionPlan, ranks: Ranks) -> list[torch.Tensor]:
    """This rank's, on the device of its masters; measured by all ranks together where one of them has not got it."""
    known = read_fisher(file, torch.device("cpu") if execution.offload != "none" else ranks.device)
    if all(ranks.gather(known is not None)):
        assert known is not None
        return known
    del known
    measured = measure()
    gc.collect()  # the engine that measured: its masters and gradients must not stand beside those of the one that learns
    write_fisher(file, measured)
    return measured


def _anchor(plan: AnchorPlan, engine: Engine, branch: Branch, weights: Sequence[torch.Tensor] | None) -> Anchor:
    if plan.kind != "product":
        return ElementAnchor(engine.anchored_masters(), plan.strength, weights)
    assert isinstance(engine, TorchEngine), "refused by the plan"
    scale = branch.selection.adapter_kind.scale(branch.lora_alpha, branch.selection.lora_rank or 1)
    return ProductAnchor(engine.adapters(), plan.strength, scale)


def _fisher_name(
    assignment: TrainRung, execution: ExecutionPlan, ranks: Ranks, retention: TokenizedSet, fingerprint: Mapping[str, str]
) -> str:
    """One file for each rank and selection: what lies where depends on the layout and on the rates' groups."""
    key = {
        "base": dict(fingerprint),
        "trainable": assignment.selection.trainable,
        "layer_decay": assignment.trial.remedies.layer_decay,
        "layout": layout_of(execution),
        "ranks": ranks.count,
        "retention": retention.sha256,
        "seed": assignment.trial.seed,
        "row_tokens": execution.row_tokens,
    }
    return f"{content_hash(key)[:16]}-rank{ranks.rank}.safetensors"
