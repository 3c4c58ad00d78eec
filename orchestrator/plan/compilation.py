"""Compiled blocks: whether a run measures if they pay, what was measured, and what was chosen by it."""

from __future__ import annotations

from orchestrator.values import Value


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
