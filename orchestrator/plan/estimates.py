"""Estimated cost, memory and placement, as values."""

from __future__ import annotations

from orchestrator.spec.models import Tune
from orchestrator.units import format_seconds
from orchestrator.values import Value


class FlopTerm(Value):
    """One term of the operations per token."""

    name: str
    flops: float
    reason: str


class CostItem(Value):
    """One item of the run's operations or of its disk space."""

    name: str
    amount: float
    """Operations, or bytes."""
    reason: str


class OptionCost(Value):
    """Operations per token and time of one full-budget trial for one choice of the search."""

    layers: str
    tune: Tune
    lora_rank: int | None
    method: str = ""
    """Tuning method as `TrialOption.method` writes it."""
    terms: tuple[FlopTerm, ...]
    flops_per_token: float
    """The sum of the terms."""
    trial_seconds: float | None
    """Time of a trial that is not stopped early, on its gang; None if the rate is unknown."""


class Rate(Value):
    """Speed that the plan assumes for one GPU (or core)."""

    device: str
    """GPU name, such as `NVIDIA H100 80GB HBM3`, or `core`."""
    peak_flops: float | None
    """Dense 16-bit operations per second from the data sheet; for a core a measured figure; None for a GPU that is not in the
    table."""
    achieved_share: float
    """Share of the peak that training is assumed to reach."""
    source: str = ""
    """Source of the peak and of the share."""
    calibrated: bool = False
    """True if the share was measured in the first steps of the run."""

    @property
    def flops(self) -> float | None:
        """Expected operations per second."""
        return None if self.peak_flops is None else self.peak_flops * self.achieved_share


class Duration(Value):
    """Range of wall-clock time in seconds."""

    low_s: float
    middle_s: float
    high_s: float

    def __str__(self) -> str:
        """Return the range, such as `2m10s to 9m00s`."""
        low, high = (format_seconds(round(each)) for each in (self.low_s, self.high_s))
        return low if low == high else f"{low} to {high}"


class CostEstimate(Value):
    """Operations, hours, price and disk space of a whole run. Hours count computing only: not starting, loading and saving."""

    rate: Rate
    options: tuple[OptionCost, ...]
    operations: tuple[CostItem, ...]
    """Operations of the run as expected, with early stopping."""
    operations_without_stopping: float
    """Operations of the run if every trial is trained to its full budget."""
    operations_refit: float
    """Operations of training the winner again; part of `operations`."""
    gpu_hours: float | None = None
    """GPU-hours with early stopping; None on CPUs, or if the rate is unknown."""
    gpu_hours_without_stopping: float | None = None
    gpu_hours_refit: float | None = None
    """GPU-hours of training the winner again; part of `gpu_hours`."""
    core_hours: float | None = None
    """Core-hours with early stopping, on machines without GPUs."""
    wall_hours: float | None = None
    """Hours until the last trial and the refit end, if every gang is busy all the time."""
    duration: Duration | None = None
    """Expected wall-clock time, with starting, saving, merging and verifying, and with the uncertainty of early stopping."""
    price_per_gpu_hour: float | None = None
    """Price of one GPU for one hour, in the currency of the spec or the cluster file."""
    price: float | None = None
    """`gpu_hours` at that price; idle GPUs are not included."""
    price_without_stopping: float | None = None
    disk: tuple[CostItem, ...] = ()
    disk_bytes: int = 0
    checkpoint_bytes: int = 0
    """One checkpoint of the largest choice: trained weights, fp32 master weights and Adam's moments."""
    bundle_bytes: int = 0
    cache_bytes: int = 0
    """Size of the tokenized data."""


class NodeSlots(Value):
    """Use of the nodes of one kind."""

    node: str
    """Description of the node, such as `8 x H100-80GB`."""
    count: int
    gangs_inside: int
    """Number of gangs that fit inside one node, over all nodes of this kind."""
    ranks_spanning: int
    """Number of ranks here that belong to gangs spanning several nodes."""
    left_over: int
    """Number of GPUs (or cores) without a rank."""


class Placement(Value):
    """Assignment of gangs to nodes."""

    unit: str
    """`GPU` or `core`."""
    ranks: int
    num_gangs: int
    num_spanning: int
    """Number of gangs that span several nodes."""
    nodes: tuple[NodeSlots, ...]
    sentences: tuple[str, ...]
    """Description of where the gangs are, and of what is left over and why."""

    @property
    def left_over(self) -> int:
        """Number of GPUs (or cores) without a rank, on all nodes."""
        return sum(kind.left_over for kind in self.nodes)


class MemoryTerm(Value):
    """One term of a rank's memory."""

    name: str
    num_bytes: int
    reason: str
    outside: bool = False
    """True for memory that torch's allocator does not count: the GPU's context, a library's own buffers, fragmentation."""
    moving: bool = False
    """True for transient memory, which is allocated and freed within a step. The name is a key of plan.json."""


class MemoryPhase(Value):
    """Peak memory of one phase of a step."""

    name: str
    num_bytes: int


class MemoryEstimate(Value):
    """Memory of one rank, term by term, in the phase that needs the most."""

    terms: tuple[MemoryTerm, ...]
    phases: tuple[MemoryPhase, ...] = ()
    """Every phase, the largest first; `terms` are those of the first."""

    @property
    def total_bytes(self) -> int:
        """Sum of the terms."""
        return sum(term.num_bytes for term in self.terms)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that `torch.cuda.max_memory_allocated` would report."""
        return sum(term.num_bytes for term in self.terms if not term.outside)
