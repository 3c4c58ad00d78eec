"""Blocks by score: how the probe is to be run, and what it found."""

from __future__ import annotations

from orchestrator.values import Value


class ProbePlan(Value):
    """How the blocks are scored before the search. Every rank of a gang does the same."""

    num_batches: int
    """Micro-batches, each one forward and one backward pass."""
    rows: int
    """Rows of each."""
    floor: int = 0
    """The first block that is scored: sums of the gradients of all those below do not fit."""
    required: bool = False
    """Whether a layer policy cannot be resolved without the scores."""
    share_of_trial: float = 0.0
    """Operations, as a share of those of the cheapest trial of the full length of the search."""


class LayerScores(Value):
    """What the probe found, one entry a block: layer_scores.json."""

    relative_gradient_norms: tuple[float | None, ...] = ()
    """Norm of the mean gradient of the block's matrices over the norm of the matrices: what blocks are chosen by. None for
    a block that was not scored."""
    signal_to_noise: tuple[float | None, ...] = ()
    """Norm of the mean gradient over the root of the summed variances; None where one micro-batch shows no variance."""
    num_batches: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    share_of_trial: float = 0.0
    """As planned: operations over those of the cheapest trial."""
    failed: str = ""
    """Why there are no scores; the search went on without."""

    @property
    def scores(self) -> tuple[float | None, ...]:
        """What blocks are chosen by, the higher the better."""
        return self.relative_gradient_norms
