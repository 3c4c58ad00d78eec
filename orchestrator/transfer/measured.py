"""What the plan said beside what the run measured, and the bundle beside the trained model, as records."""

from __future__ import annotations

from typing import Literal

from orchestrator.values import Value


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
