"""The start of a new linear classifier: logistic regression on the features that it reads of the base.

For a head alone this is nearly the end: its features are the same at every step, and the fit is a convex problem over all
documents at once, from whose solution a few hundred steps of a first-order optimizer stay far where features differ in scale
(docs/results.md). Where blocks are trained too, a fitted head does not distort them in the first steps as a random one does
(Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution": LP-FT).

Shapes: N documents, H width of the features, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from orchestrator.data import TokenizedSet
from orchestrator.data.rng import HEAD_FIT, generator
from orchestrator.train import heartbeat
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.context import HostContext
from orchestrator.train.engines.construction import forward_ready
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.engines.zero3_warm import assign_whole
from orchestrator.train.model.logistic import HELD_OUT, PENALTIES, FittedHead, fit
from orchestrator.train.model.objective import Objective
from orchestrator.train.training_sets import TrainingSets
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.units import MIB
from orchestrator.work.execution import ExecutionPlan

FEATURE_BYTES = 256 * MIB
"""Largest size of the features in float32: of more documents a seeded choice is taken."""


def starts_from_fit(branch: Branch, control: str | None) -> bool:
    """Return whether a trial's classifier starts from a fit: a linear one on the base's own features, if it is trained alone or
    reads pooled hidden states. What the transformers class puts below a classifier is trained with it from random weights."""
    anatomy, selection = branch.base.anatomy, branch.selection
    if not selection.new_classifier or control == "scratch":
        return False
    alone = set(selection.trainable) <= {anatomy.classifier_weight, anatomy.classifier_bias} and not selection.adapted
    return alone or not anatomy.pooling.by_class


def start_from_fit(
    context: HostContext, execution: ExecutionPlan, sets: TrainingSets, branch: Branch, objective: Objective
) -> str:
    """Set the classifier of a branch to the logistic regression on the trial's training documents. Called on every rank.

    Returns:
        A sentence for the run's record.
    """
    heartbeat.enter("fitting the head")
    data, seed, cut = sets.steps.data, sets.work.trial.seed, sets.work.selection.cut
    # The cut is part of the key: stored states may differ in the last bits, and a trial's numbers must not depend on others.
    key = f"{data.sha256} {seed} {cut} {sets.states is not None} {execution.model_dump_json()}"
    if key not in context.fitted_heads:
        context.fitted_heads[key] = _fitted(context, execution, sets, branch, objective)
    fitted = context.fitted_heads[key]
    _assign(branch, fitted, partitioned=is_partitioned(execution))
    heartbeat.enter("preparing")
    return (
        f"the head starts from logistic regression on the features of {fitted.num_documents} training documents "
        f"(penalty {fitted.penalty:g} of {', '.join(f'{each:g}' for each in PENALTIES)}, by {HELD_OUT:.0%} of them)"
    )


def _fitted(
    context: HostContext, execution: ExecutionPlan, sets: TrainingSets, branch: Branch, objective: Objective
) -> FittedHead:
    data, seed = sets.steps.data, sets.work.trial.seed
    limit = max(1, FEATURE_BYTES // (4 * context.base.anatomy.hidden_size))
    chosen = np.arange(len(data))
    if len(data) > limit:
        chosen = np.sort(generator(seed, HEAD_FIT).permutation(len(data))[:limit])
    rows = context.rows(execution)
    objective.eval()
    with torch.no_grad(), forward_ready(objective, execution):
        own = features_of(objective, branch.head(), data, chosen, rows, sets.states)
    objective.train()
    # Every rank has some of the documents; in their order, so that the fit does not depend on the ranks.
    parts = context.ranks.gather(own)
    documents = torch.cat([documents for documents, _ in parts])
    features = torch.cat([features for _, features in parts])[documents.argsort()]
    labels = torch.as_tensor(data.labels[chosen].astype(np.int64))
    device = context.ranks.device
    found = None
    if context.ranks.first:
        biased = _bias(branch) is not None
        found = fit(features.to(device), labels.to(device), context.base.load.num_classes, seed, biased=biased)
    return context.ranks.broadcast(found)


def features_of(
    objective: Objective, head: nn.Module, data: TokenizedSet, documents: np.ndarray, rows: RowPlan, states: TrunkStates | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int64[n], float32[n, H]): this rank's share of the documents, and what the head reads of each."""
    taken: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    owners: list[torch.Tensor] = []
    device = next(objective.model.parameters()).device
    hook = head.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    try:
        for batch in rows.batches(data, documents):
            heartbeat.beat()
            tensors = to_tensors(batch, device, states)
            objective.class_logits(tensors["input_ids"], tensors["lengths"], tensors.get("hidden"))
            # A row of padding alone has no document.
            real = tensors["class_labels"] >= 0
            found.append(taken.pop()[real].float().cpu())
            owners.append(tensors["document_ids"][:, 0][real].cpu())
    finally:
        hook.remove()
    return torch.cat(owners), torch.cat(found)


def _bias(branch: Branch) -> nn.Parameter | None:
    name = branch.base.anatomy.classifier_bias
    return branch.model.get_parameter(name) if name else None


def _assign(branch: Branch, fitted: FittedHead, *, partitioned: bool) -> None:
    weight, bias = branch.model.get_parameter(branch.base.anatomy.classifier_weight), _bias(branch)
    for parameter, value in ((weight, fitted.weight), (bias, fitted.bias)):
        if parameter is None:
            continue
        if partitioned:
            assign_whole(parameter, value)
        else:
            parameter.data.copy_(value)
