"""What a run costs and where its gangs stand: the plan's values beside its decisions."""

from __future__ import annotations

from orchestrator.spec.models import Tune
from orchestrator.units import format_seconds
from orchestrator.values import Value


class FlopTerm(Value):
    """A part of the operations of one token."""

    name: str
    flops: float
    reason: str


class CostItem(Value):
    """A part of the run's operations, or of its disk."""

    name: str
    amount: float
    """Operations, or bytes."""
    reason: str


class OptionCost(Value):
    """What one token, and one trial of the whole budget, take with one choice of the search."""

    layers: str
    tune: Tune
    lora_rank: int | None
    method: str = ""
    """As the choice has it."""
    terms: tuple[FlopTerm, ...]
    flops_per_token: float
    """The sum of the terms."""
    trial_seconds: float | None
    """A trial that nothing stops, on its gang; None where the rate is unknown."""


class Rate(Value):
    """How fast one GPU (or core) is taken to work."""

    device: str
    """`NVIDIA H100 80GB HBM3`, or `core`."""
    peak_flops: float | None
    """Dense 16-bit operations a second by the data sheet; for a core what was measured; None where it is not in the table."""
    achieved_share: float
    """Share of the peak that training reaches."""
    source: str = ""
    """Of the peak, and of the share."""
    calibrated: bool = False
    """Whether the share was measured in the run's own first steps."""

    @property
    def flops(self) -> float | None:
        """Operations a second that are counted on."""
        return None if self.peak_flops is None else self.peak_flops * self.achieved_share


class Duration(Value):
    """Seconds by the clock."""

    low_s: float
    middle_s: float
    high_s: float

    def __str__(self) -> str:
        """`2m10s to 9m00s`."""
        low, high = (format_seconds(round(each)) for each in (self.low_s, self.high_s))
        return low if low == high else f"{low} to {high}"


class CostEstimate(Value):
    """Operations, hours, money and disk of a whole run. Hours are of computing: no starts, loads and saves."""

    rate: Rate
    options: tuple[OptionCost, ...]
    operations: tuple[CostItem, ...]
    """Of the run as it is expected to go, with early stopping."""
    operations_without_stopping: float
    """Of the run with every trial trained to its whole budget."""
    operations_refit: float
    """Of the winner's second training; part of `operations`."""
    gpu_hours: float | None = None
    """With early stopping; None on cores, and where the rate is unknown."""
    gpu_hours_without_stopping: float | None = None
    gpu_hours_refit: float | None = None
    """Part of `gpu_hours`."""
    core_hours: float | None = None
    """With early stopping, where there is no GPU."""
    wall_hours: float | None = None
    """Every gang busy until the last trial ends, then the refit."""
    duration: Duration | None = None
    """By the clock, with starting, saving, merging and judging, and with what early stopping may not save."""
    price_per_gpu_hour: float | None = None
    """In the currency of whoever gave it."""
    price: float | None = None
    """`gpu_hours` at that price; GPUs that stand idle are not in it."""
    price_without_stopping: float | None = None
    disk: tuple[CostItem, ...] = ()
    disk_bytes: int = 0
    checkpoint_bytes: int = 0
    """One checkpoint of the largest choice: what it learned, with masters and moments."""
    bundle_bytes: int = 0
    cache_bytes: int = 0
    """Tokenised data."""


class NodeSlots(Value):
    """What stands on the nodes of one kind."""

    node: str
    """`8 x H100-80GB`."""
    count: int
    gangs_inside: int
    """Gangs that lie inside one node, over all nodes of this kind."""
    ranks_spanning: int
    """Ranks here of gangs that lie over several nodes."""
    left_over: int
    """GPUs (or cores) without a rank."""


class Placement(Value):
    """Where gangs stand."""

    unit: str
    """GPU or core."""
    ranks: int
    num_gangs: int
    num_spanning: int
    """Gangs that lie over several nodes."""
    nodes: tuple[NodeSlots, ...]
    sentences: tuple[str, ...]
    """Where gangs stand; what is left over, and why."""

    @property
    def left_over(self) -> int:
        return sum(kind.left_over for kind in self.nodes)


class MemoryTerm(Value):
    name: str
    num_bytes: int
    reason: str
    outside: bool = False
    """Whether torch's allocator does not count it: the GPU's context, a library's own buffers, fragmentation."""
    moving: bool = False
    """Whether it comes and goes within a step."""


class MemoryPhase(Value):
    """A moment of a step, and the most that is held in it."""

    name: str
    num_bytes: int


class MemoryEstimate(Value):
    """Memory of one rank, term by term, in the phase that needs most."""

    terms: tuple[MemoryTerm, ...]
    phases: tuple[MemoryPhase, ...] = ()
    """Every phase, the largest first: its terms are those above."""

    @property
    def total_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` would show."""
        return sum(term.num_bytes for term in self.terms if not term.outside)
