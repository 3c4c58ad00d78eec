"""What was measured of the machinery and of the bundle, and what the plan had said, as records."""

from __future__ import annotations

from typing import Literal

from orchestrator.values import Value


class EngineFigures(Value):
    """Which machinery served a trial, in figures."""

    executor: str
    engine_class: str = ""
    zero_stage: int = 0
    ranks: int = 1
    partitioned_bytes: int = 0
    peak_memory_bytes: int = 0
    base_loads: int = 1
    ordinal: int = 0
    """How many assignments the gang had run before."""
    device: str = ""
    rank_peak_memory_bytes: tuple[int, ...] = ()
    """Measured, by rank: on a GPU the most that torch's allocator held, on a CPU the process's resident memory."""
    predicted_memory_bytes: int | None = None
    """What the plan expected a rank to use."""
    micro_batch_rows: int = 0
    checkpointing: bool = False
    fused_trials: int = 1
    """How many trials shared its last rung's batches."""
    compiled: bool = False
    """Whether its blocks were compiled."""
    compile_seconds: float = 0.0
    """What compiling them took in its last rung."""


class PlanAgainstMeasured(Value):
    """One planned figure beside the measured one."""

    name: str
    planned: float | None
    measured: float | None
    unit: Literal["bytes", "seconds", "count", "tokens/s"]


class MemoryRow(Value):
    """What the plan said that a rank would use for one choice of the search, beside what its trials measured."""

    label: str
    """`last:4 · lora r16`, or `untouched base`."""
    num_trials: int
    device: str
    predicted_bytes: int | None
    """None where the plan has no figure for it."""
    measured_bytes: int
    """Of the rank and the trial that used most: on a GPU the most that torch's allocator held, on a CPU the process's
    resident memory. 0 where no trial came so far as to be measured."""
    rank_peak_bytes: tuple[int, ...]
    """By rank, the most of any trial."""
    ratio: float | None
    """Measured by predicted; None too where memory ran out, for then what was measured is not what was planned."""
    micro_batch_rows: int
    """The fewest that a trial came down to."""
    checkpointing: bool = False
    num_out_of_memory: int = 0
    """Trials in which memory ran out."""
    num_failed_for_memory: int = 0
    """Those of them for which nothing smaller was left."""


class VerificationFigures(Value):
    """The bundle against the trained model (law 5). KL divergences are means, nats per token."""

    passed: bool
    kl_bundle: float
    """KL(trained || bundle)."""
    kl_base: float
    """KL(trained || base)."""
    limit: float
    num_prompts: int
    num_tokens: int = 0
    seconds: float = 0.0
    merged_into: str = ""
    """`dequantized` or `original`: which base the adapter was merged into."""
