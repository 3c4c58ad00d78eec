"""Measurements that a gang makes before the search, planned and found: compiled blocks, block scores, domain shift."""

from __future__ import annotations

from orchestrator.values import Value


class ShiftPlan(Value):
    """How the distance of target and retention set is measured before the search."""

    cuts: tuple[int, ...]
    """What enters these blocks is compared, ascending."""
    num_documents: int
    """Of each set, at most."""


class CompilePlan(Value):
    """Whether a gang measures, before the search, what compiled blocks gain."""

    option: int | None
    """The choice of the search that is measured, by index; None where nothing is."""
    reason: str
    """Why it is measured, or why not."""
    num_kinds: int = 0
    """Choices of the search that need code of their own."""
    gang_seconds: float | None = None
    """What a gang is planned to train for in the whole search; None where the rate of the machine is unknown."""
    required: bool = False
    """`resources.compile: on`: what is measured is recorded, and decides nothing."""


class CompileTimes(Value):
    """What a gang measured of one choice of the search."""

    eager_seconds: float = 0.0
    """Of a full micro-batch, forwards and backwards, the fastest of a few."""
    compiled_seconds: float = 0.0
    """Likewise, padded to the width of a row, once the blocks are compiled."""
    compile_seconds: float = 0.0
    """What compiling them took."""
    full_share: float = 1.0
    """Of the tokens of the first steps, those in full micro-batches."""
    failed: str = ""
    """Why there are no times."""


class CompileChoice(Value):
    """Whether the run's trials train with compiled blocks: compile.json. All of them do, or none."""

    compiled: bool
    reason: str
    times: CompileTimes | None = None
    """None where nothing was measured."""


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


class BlockShift(Value):
    """The distance of the two sets in what enters one block."""

    cut: int
    """The block; the number of blocks means the final norm."""
    distance: float
    """Proxy A-distance, from 0 (nothing tells the two apart) to 2 (everything does)."""
    low: float
    """Lower end of its 95% interval, over documents."""
    high: float


class DomainShift(Value):
    """What was found: domain_shift.json."""

    blocks: tuple[BlockShift, ...] = ()
    target_documents: int = 0
    retention_documents: int = 0
    seconds: float = 0.0
    failed: str = ""
    """Why there is nothing; the search goes on without."""
