"""Failures of work as values: code branches on `kind`, and users read `message` and `remedy`."""

from __future__ import annotations

from typing import Literal

from orchestrator.errors import (
    DataError,
    IntegrityError,
    NonFiniteLossError,
    OrchestratorError,
    OutOfMemoryError,
    RankOutOfMemoryError,
    SelectionError,
    TrainingError,
    UsageError,
)
from orchestrator.units import printable_lines
from orchestrator.values import Value

FailureKind = Literal[
    "out_of_memory", "non_finite", "data", "integrity", "selection", "usage", "training", "gang", "withdrawn", "other"
]
"""`out_of_memory`: memory use cannot be reduced further in the gang; `gang`: every gang that tried it failed; `withdrawn`: its
trial ended before it ran; `other`: an error without a kind of its own, or one recorded by a version without kinds."""
KINDS: tuple[tuple[type[OrchestratorError], FailureKind], ...] = (
    (OutOfMemoryError, "out_of_memory"),
    (RankOutOfMemoryError, "out_of_memory"),
    (NonFiniteLossError, "non_finite"),
    (TrainingError, "training"),
    (DataError, "data"),
    (IntegrityError, "integrity"),
    (SelectionError, "selection"),
    (UsageError, "usage"),
)
"""Kind by error type; the first that fits counts."""
OUT_OF_MEMORY_SENTENCES = ("memory use cannot be reduced further in this gang", "no smaller way is left in this gang")
"""Sentences of versions without failure kinds for a trial whose memory use could not be reduced further."""


class Failure(Value):
    """Why work failed. `str()` gives the whole text, as a user reads it."""

    kind: FailureKind
    message: str
    remedy: str = ""
    """The remedy, as the last line of the text."""

    def __str__(self) -> str:
        return f"{self.message}\n  to do: {self.remedy}" if self.remedy else self.message

    @classmethod
    def of(cls, error: OrchestratorError) -> Failure:
        """Return the failure that an error stands for; its text is that of the error."""
        kinds: list[FailureKind] = [kind for error_type, kind in KINDS if isinstance(error, error_type)]
        return cls(kind=kinds[0] if kinds else "other", message=error.description, remedy=printable_lines(error.remedy))

    @classmethod
    def recorded(cls, reason: str) -> Failure:
        """Return the failure in a record of a version that wrote only the text.

        This is the one place that reads the kind out of a sentence.
        """
        known = any(sentence in reason for sentence in OUT_OF_MEMORY_SENTENCES)
        return cls(kind="out_of_memory" if known else "other", message=reason)
