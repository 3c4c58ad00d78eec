"""Measurements that a gang makes before the search, planned and found: compiled blocks, block scores, domain shift."""

from __future__ import annotations

from orchestrator.values import Value


class ShiftPlan(Value):
    """The plan for measuring the distance between target and retention set before the search."""

    cuts: tuple[int, ...]
    """Blocks whose inputs are compared, ascending."""
    num_documents: int
    """Upper bound on the documents of each set."""


class CompilePlan(Value):
    """The plan for measuring, before the search, how much time compiled blocks save."""

    option: int | None
    """Index of the search option that is measured; None if there is no measurement."""
    reason: str
    """Why it is measured, or why not."""
    num_kinds: int = 0
    """Search options that need their own compiled code."""
    gang_seconds: float | None = None
    """Planned training seconds of a gang in the whole search; None if the rate of the machine is unknown."""
    required: bool = False
    """`resources.compile: on`: the measurement is recorded and decides nothing."""


class CompileTimes(Value):
    """The times that a gang measured for one option of the search."""

    eager_seconds: float = 0.0
    """Time of the forward and backward pass of a full micro-batch, the fastest of a few."""
    compiled_seconds: float = 0.0
    """The same with compiled blocks, padded to the row length."""
    compile_seconds: float = 0.0
    """Time spent compiling."""
    full_share: float = 1.0
    """Share of the tokens of the first steps that are in full micro-batches."""
    failed: str = ""
    """Why there are no times."""


class CompileChoice(Value):
    """The decision whether a run's trials train with compiled blocks (compile.json): all of them do, or none."""

    compiled: bool
    reason: str
    times: CompileTimes | None = None
    """None if nothing was measured."""


class ProbePlan(Value):
    """The plan for scoring the blocks before the search. Every rank of a gang does the same."""

    num_batches: int
    """Micro-batches, each one forward and one backward pass."""
    rows: int
    """Rows of each."""
    floor: int = 0
    """The first block that is scored: sums of the gradients of all those below do not fit."""
    required: bool = False
    """True if a layer policy needs the scores."""
    share_of_trial: float = 0.0
    """Operations, as a share of those of the cheapest trial of the full length of the search."""


class LayerScores(Value):
    """The scores that the probe computed, one entry per block (layer_scores.json)."""

    relative_gradient_norms: tuple[float | None, ...] = ()
    """Norm of the mean gradient of the block's matrices over the norm of the matrices: the score by which blocks are chosen.
    None for
    a block that was not scored."""
    signal_to_noise: tuple[float | None, ...] = ()
    """Norm of the mean gradient over the root of the summed variances; None where one micro-batch shows no variance."""
    num_batches: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    share_of_trial: float = 0.0
    """Planned operations as a share of those of the cheapest trial."""
    failed: str = ""
    """Why there are no scores; the search continued without them."""

    @property
    def scores(self) -> tuple[float | None, ...]:
        """Return the scores by which blocks are chosen; higher is better."""
        return self.relative_gradient_norms


class BlockShift(Value):
    """The distance of the two sets in what enters one block."""

    cut: int
    """The block; the number of blocks means the final norm."""
    distance: float
    """Proxy A-distance, from 0 (indistinguishable) to 2 (fully separable)."""
    low: float
    """Lower end of its 95% interval, over documents."""
    high: float


class DomainShift(Value):
    """The measured domain shift (domain_shift.json)."""

    blocks: tuple[BlockShift, ...] = ()
    target_documents: int = 0
    retention_documents: int = 0
    seconds: float = 0.0
    failed: str = ""
    """Why the measurement failed; the search continues without it."""
