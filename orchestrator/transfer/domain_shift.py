"""Distance between target and retention set in the base model's features, and the search order that it recommends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.spec.models import FEW_EXAMPLES
from orchestrator.values import Value

Floats = NDArray[np.float64]
NUM_FOLDS = 5
RIDGES = (1e-2, 1e0, 1e2)
"""Ridge coefficients of the linear probe, relative to the features' variance; the best one is chosen by leave-one-fold-out on
the training folds only."""
MIN_DOCUMENTS = 10
"""Fewest documents of each set. With ten the interval is wide, and shows it."""
NEAR, FAR = 0.8, 1.6
"""On a scale from 0 (nothing tells the two apart) to 2 (everything does): errors of 0.3 and 0.1 of a probe. Chosen, not
measured; so are the next two."""
LOSS_GAP = 0.5
"""Nats per token by which the base fits a far target worse than the retention set."""


def proxy_a_distance(target: Floats, reference: Floats, seed: int) -> tuple[float, float, float]:
    """Return 2 (1 - 2 e) with its 95% interval, from the error e of a linear probe that separates the two sets.

    The error is balanced (the mean of both sides' own) and cross-validated: every document is judged by a probe that has not
    seen it (Ben-David et al. 2007, "Analysis of representations for domain adaptation", section 6, there on one split). The probe
    is least squares with a ridge, on features standardised by the training folds. The interval is that of both errors as
    proportions (Wilson), at a distance below 0 cut off at 0.

    Args:
        target: float[n, H], a row for each document.
        reference: float[m, H].
        seed: Seed of the folds.

    Raises:
        ValueError: fewer than MIN_DOCUMENTS on a side, unequal widths, a figure that is not finite.
    """
    _check(target, reference)
    features = np.concatenate([target, reference]).astype(float)
    side = np.concatenate([np.ones(len(target)), -np.ones(len(reference))])
    folds = _folds(side, seed)
    wrong = np.zeros(len(side), dtype=bool)
    for fold in range(NUM_FOLDS):
        held, rest = folds == fold, folds != fold
        # Chosen without the held-out fold, or the error would be optimistic.
        ridge = _best_ridge(features[rest], side[rest], folds[rest])
        # A document on the boundary counts as an error.
        wrong[held] = _decide(features[rest], side[rest], features[held], ridge) * side[held] <= 0
    rates = [(float(wrong[side == of].mean()), int((side == of).sum())) for of in (1.0, -1.0)]
    error = sum(rate for rate, _ in rates) / 2
    spread = 1.96 * sum(_wilson_variance(rate, count) for rate, count in rates) ** 0.5 / 2
    low, mean, high = (2 * (1 - 2 * each) for each in (error + spread, error, error - spread))
    return max(0.0, mean), max(0.0, low), min(2.0, max(0.0, high))


def _check(target: Floats, reference: Floats) -> None:
    if min(len(target), len(reference)) < MIN_DOCUMENTS:
        raise ValueError(f"{len(target)} and {len(reference)} documents: expected at least {MIN_DOCUMENTS} of each")
    if target.ndim != 2 or reference.ndim != 2 or target.shape[1] != reference.shape[1]:
        raise ValueError(f"features of shapes {target.shape} and {reference.shape}: expected [n, H] and [m, H]")
    if not (np.isfinite(target).all() and np.isfinite(reference).all()):
        raise ValueError("a feature is not finite")


def _folds(side: Floats, seed: int) -> NDArray[np.int64]:
    """Assign documents to folds, with both sets spread evenly over them."""
    random = np.random.default_rng(seed)
    folds = np.zeros(len(side), dtype=np.int64)
    for of in (1.0, -1.0):
        members = random.permutation(np.flatnonzero(side == of))
        folds[members] = np.arange(len(members)) % NUM_FOLDS
    return folds


def _best_ridge(features: Floats, side: Floats, folds: NDArray[np.int64]) -> float:
    def errors(ridge: float) -> int:
        count = 0
        for fold in np.unique(folds):
            held, rest = folds == fold, folds != fold
            count += int(np.count_nonzero(_decide(features[rest], side[rest], features[held], ridge) * side[held] <= 0))
        return count

    return min(RIDGES, key=errors)


def _decide(features: Floats, side: Floats, asked: Floats, ridge: float) -> Floats:
    """Return the probe's decision values: above 0 means target. Both sets have the same total weight."""
    mean, scale = features.mean(0), features.std(0)
    # A constant feature would divide by zero.
    scale = np.where(scale > 0, scale, 1.0)
    known, unknown = (features - mean) / scale, (asked - mean) / scale
    first, second = np.count_nonzero(side > 0), np.count_nonzero(side < 0)
    weight: Floats = np.where(side > 0, 0.5 / first, 0.5 / second)
    known, unknown = (np.column_stack([each, np.ones(len(each))]) for each in (known, unknown))
    penalty = ridge * np.eye(known.shape[1]) / len(known)
    # The intercept is not penalised.
    penalty[-1, -1] = 0.0
    solved = np.linalg.solve(known.T @ (weight[:, None] * known) + penalty, known.T @ (weight * side))
    return np.asarray(unknown @ solved, dtype=np.float64)


def _wilson_variance(rate: float, count: int) -> float:
    """Return the variance of a proportion by Wilson's interval: not 0 even if no error was made."""
    # z^2 = 1.96^2 rounded to 4: two successes and two failures are added (Agresti and Coull 1998).
    centre = (rate * count + 2) / (count + 4)
    return centre * (1 - centre) / (count + 4)


Prior = Literal["none", "near", "far", "few"]


class Advice(Value):
    """Recommended start of the search. A prior only: no choice is excluded."""

    kind: Prior
    sentence: str


def advise(
    distances: Sequence[float],
    *,
    target_loss: float | None,
    retention_loss: float | None,
    num_documents: int,
    failed: str = "",
) -> Advice:
    """Return `few` if there are too few examples to train many weights; else `near`, `far` or `none`.

    The features are not enough, since a linear probe can separate nearly any two sources. So a target counts as far
    only where the base is known to fit it worse than the retention set by LOSS_GAP, and the features are far or not known; as
    near where the base does not, or where the features are near.

    Args:
        distances: Proxy A-distances, one for each cut; empty where they are not known.
        target_loss: The base model's loss on the eval set, nats per token.
        retention_loss: Its loss on the retention set.
        num_documents: Training documents.
        failed: Why there are no distances.
    """
    distance = sum(distances) / len(distances) if distances else None
    gap = target_loss - retention_loss if target_loss is not None and retention_loss is not None else None
    said = _figures(distance, target_loss, retention_loss, num_documents) + (f"; not measured: {failed}" if failed else "")
    # Checked first: with few examples the size of the data matters more than its distance.
    if num_documents <= FEW_EXAMPLES:
        return Advice(kind="few", sentence=f"few examples: the head or few blocks first ({said})")
    if (distance is not None and distance < NEAR) or (gap is not None and gap < LOSS_GAP):
        return Advice(kind="near", sentence=f"the target is near: many blocks at small rates first ({said})")
    if gap is None:
        return Advice(kind="none", sentence=f"no recommendation on where to begin ({said})")
    if distance is None or distance > FAR:
        return Advice(kind="far", sentence=f"the target is far: the upper blocks first, the early ones frozen ({said})")
    return Advice(kind="none", sentence=f"the target is neither near nor far: no order is recommended ({said})")


def _figures(distance: float | None, target_loss: float | None, retention_loss: float | None, num_documents: int) -> str:
    """Return `distance 1.93 of 2, the base's loss 5.27 on the target and 3.10 on the retention set, 900 examples`."""
    parts = [f"distance {distance:.2f} of 2"] if distance is not None else []
    if target_loss is not None and retention_loss is not None:
        parts.append(f"the base's loss {target_loss:.2f} on the target and {retention_loss:.2f} on the retention set")
    return ", ".join([*parts, f"{num_documents} training examples"])
