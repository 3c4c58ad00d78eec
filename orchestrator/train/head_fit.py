"""The start of a head-only classifier: multinomial logistic regression on the features that the head reads.

Everything below the head is frozen and without dropout, so that its features are the same at every step and the fit is a convex
problem over all documents at once. A few hundred steps of a first-order optimizer stay far from its solution where features
differ in scale (docs/results.md).

Shapes: N documents, H width of the features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from orchestrator.data import TokenizedSet
from orchestrator.data.rng import HEAD_FIT, generator
from orchestrator.train import heartbeat
from orchestrator.train.adapters.branch import Branch
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.context import HostContext
from orchestrator.train.engines.construction import forward_ready
from orchestrator.train.engines.engine import is_partitioned
from orchestrator.train.engines.zero3_warm import assign_whole
from orchestrator.train.model.objective import Objective
from orchestrator.train.training_sets import TrainingSets
from orchestrator.train.trunk.states import TrunkStates
from orchestrator.units import MIB
from orchestrator.work.execution import ExecutionPlan

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Penalties that are tried: factors of half the squared weights of standardised features, beside the mean loss."""
HELD_OUT = 0.2
"""Share of the documents on which the penalties are compared."""
FEATURE_BYTES = 256 * MIB
"""Largest size of the features in float32: of more documents a seeded choice is taken."""
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class FittedHead:
    """A linear map from features to logits, and how it was found."""

    weight: torch.Tensor
    """float32[C, H]"""
    bias: torch.Tensor
    """float32[C]"""
    penalty: float


def trains_linear_head_alone(branch: Branch) -> bool:
    """Return whether a branch trains nothing but a new linear classifier."""
    anatomy, selection = branch.base.anatomy, branch.selection
    own = {anatomy.classifier_weight, anatomy.classifier_bias}
    return selection.new_classifier and not selection.adapted and set(selection.trainable) <= own


def start_from_fit(
    context: HostContext, execution: ExecutionPlan, sets: TrainingSets, branch: Branch, objective: Objective
) -> str:
    """Set the classifier of a branch to the logistic regression on the trial's training documents. Called on every rank.

    Returns:
        A sentence for the run's record.
    """
    heartbeat.enter("fitting the head")
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
    fitted = context.ranks.broadcast(
        fit(features.to(device), labels.to(device), context.base.load.num_classes, seed, biased=_bias(branch) is not None)
        if context.ranks.first
        else None
    )
    _assign(branch, fitted, partitioned=is_partitioned(execution))
    return (
        f"the head starts from logistic regression on the features of {len(chosen)} training documents "
        f"(penalty {fitted.penalty:g} of {', '.join(f'{each:g}' for each in PENALTIES)}, by {HELD_OUT:.0%} of them)"
    )


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


def fit(features: torch.Tensor, labels: torch.Tensor, num_classes: int, seed: int, *, biased: bool = True) -> FittedHead:
    """Fit multinomial logistic regression on standardised features, by L-BFGS (Liu and Nocedal, 1989).

    The penalty is the best of PENALTIES on a seeded share of the documents; from the strongest one on, each fit starts from the
    one before. The standardisation is folded into the map.

    Args:
        features: float32[N, H].
        labels: int64[N].
        biased: Whether the head has a bias. Without one features are scaled and not centred.
    """
    mean = features.mean(0) if biased else torch.zeros_like(features[0])
    scale = features.std(0, correction=0).clamp(min=1e-6)
    standard = (features - mean) / scale
    order = torch.as_tensor(generator(seed, HEAD_FIT).permutation(len(labels)), device=features.device)
    held, rest = order[: int(HELD_OUT * len(labels))], order[int(HELD_OUT * len(labels)) :]
    weights = torch.zeros(num_classes, features.shape[1] + 1, device=features.device)
    tried: list[tuple[float, float, torch.Tensor]] = []
    for penalty in PENALTIES:
        weights = _minimum(standard[rest], labels[rest], weights, penalty, biased=biased)
        loss = float(functional.cross_entropy(_logits(standard[held], weights), labels[held])) if len(held) else penalty
        tried.append((loss, penalty, weights))
    _, penalty, start = min(tried, key=lambda entry: entry[:2])
    best = _minimum(standard, labels, start, penalty, biased=biased)
    weight = best[:, :-1] / scale
    return FittedHead(weight.cpu(), (best[:, -1] - weight @ mean).cpu(), penalty)


def _minimum(features: torch.Tensor, labels: torch.Tensor, start: torch.Tensor, penalty: float, *, biased: bool) -> torch.Tensor:
    """Return the weights [C, H + 1], the last column the bias, of least mean loss and penalty."""
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=MAX_ITERATIONS, history_size=10, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        heartbeat.beat()
        optimizer.zero_grad()
        value = functional.cross_entropy(_logits(features, weights), labels)
        value = value + penalty / 2 * weights[:, :-1].square().sum()
        value.backward()
        if not biased and weights.grad is not None:
            weights.grad[:, -1] = 0.0
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _logits(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


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
