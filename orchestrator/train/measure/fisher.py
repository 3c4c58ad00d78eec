"""Measure the importance of each trainable weight for the retention set: EWC's diagonal Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from orchestrator.data import TokenizedSet
from orchestrator.data.rng import FISHER, generator
from orchestrator.plan.remedies import FISHER_DOCUMENTS
from orchestrator.store import write_atomic
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.engines.engine import Engine
from orchestrator.train.model.recompute import keep_recomputing
from orchestrator.train.ranks import Ranks


def fisher_information(engine: Engine, data: TokenizedSet, rows: RowPlan, ranks: Ranks, seed: int) -> list[torch.Tensor]:
    """Return the mean over documents of the squared gradient of a document's loss sum: float32, shaped as this rank's masters.

    That is the diagonal of the empirical Fisher information (Kirkpatrick et al. 2017; on the documents' own tokens, not on
    tokens drawn from the model; Kunstner et al. 2019 discuss the difference). Every rank computes the same documents, one at a
    time, since a gradient that is summed over ranks or rows can no longer be squared document by document.

    Args:
        engine: An engine at the base's weights, with an optimizer that sums squares: see `SquaredGradients`.
        data: The retention set, or a part of it that is not scored.
        seed: Seed of the choice of documents.
    """
    chosen = generator(seed, FISHER).permutation(len(data))[:FISHER_DOCUMENTS]
    alone = RowPlan(rows.row_tokens, 1, pack=False, pads=rows.pads)
    was_training = engine.objective.training
    engine.objective.eval()  # dropout would add its own noise
    # Blocks that recompute look at their own mode, which `eval` has just set.
    keep_recomputing(engine.objective)
    for document in np.sort(chosen).tolist():
        (batch,) = alone.batches(data, np.asarray([document]))
        # All ranks compute the same document and engines sum over ranks: the share makes the sum the document's own gradient.
        engine.backward(engine.loss(to_tensors(batch, ranks.device)), 1.0 / ranks.count)
        engine.step(0.0)
    engine.objective.train(was_training)
    return [square.div_(len(chosen)) for square in engine.squared_gradients()]


def importances(fisher: Sequence[torch.Tensor], num_weights: int, ranks: Ranks, *, partitioned: bool) -> list[torch.Tensor]:
    """Return the Fisher information divided by its mean over all ranks: 1 on average. All 1 if it is 0 everywhere.

    Args:
        fisher: Changed in place into the answer: it is as large as the trainable weights.
        num_weights: Trainable elements on all ranks together; masters may be longer because of padding.
        partitioned: Whether each rank has only a part of them.
    """
    (total,) = ranks.sum([sum(float(part.double().sum()) for part in fisher)])
    mean = total / (num_weights if partitioned else num_weights * ranks.count)
    return [part.div_(mean) if mean > 0 else part.fill_(1.0) for part in fisher]


def read_fisher(file: Path, device: torch.device) -> list[torch.Tensor] | None:
    """Read the stored Fisher information; None if it is missing or damaged."""
    try:
        found = load_file(file, device=str(device))
    except (OSError, SafetensorError):
        return None
    return [found[str(index)] for index in range(len(found))]


def write_fisher(file: Path, fisher: Sequence[torch.Tensor]) -> None:
    """Whole or not at all; two gangs that compute the same write the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({str(index): part.cpu().contiguous() for index, part in enumerate(fisher)}))
