"""Multinomial logistic regression on the features that a linear head reads.

Shapes: N documents, H width of the features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from orchestrator.data.rng import HEAD_FIT, generator
from orchestrator.train import heartbeat

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Penalties that are tried: factors of half the squared weights of standardised features, beside the mean loss."""
HELD_OUT = 0.2
"""Share of the documents on which the penalties are compared."""
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class FittedHead:
    """A linear map from features to logits, and how it was found."""

    weight: torch.Tensor
    """float32[C, H]"""
    bias: torch.Tensor
    """float32[C]"""
    penalty: float
    num_documents: int


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
    return FittedHead(weight.cpu(), (best[:, -1] - weight @ mean).cpu(), penalty, len(labels))


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
