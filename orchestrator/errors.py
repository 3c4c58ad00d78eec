"""All errors that a user may see, in one picklable tree.

    OrchestratorError             exit code
    ├── SpecError                 2   the spec; carries one SpecProblem per mistake, all at once
    ├── DataError                 2   a data file, a row, a split
    ├── BaseError                 2   the base: files, headers, layout, what it would execute
    ├── SelectionError            2   a layer policy that matches nothing or does not fit the base
    ├── UsageError                2   a command's arguments
    ├── RunConflictError          2   the run folder belongs to another run
    ├── IntegrityError            4   a file is not what its manifest says
    ├── PlanError                 3   the plan does not fit the cluster
    ├── TrainingError             4   training failed
    │   ├── NonFiniteLossError    4   the loss or the gradient became NaN or infinite
    │   └── OutOfMemoryError      4   out of memory on every rank, at the smallest micro-batch: the trial fails
    ├── CheckpointError           4   a checkpoint could not be written: the gang is replaced
    ├── RankOutOfMemoryError      4   out of memory on one rank while the others wait: the gang is replaced
    ├── BaseLostError             4   the base could not be restored after a trial: the gang is replaced
    ├── NothingPromotedError      5   `--require-promotion`, and no trial was promoted
    └── VerificationError         6   the bundle does not reproduce the trained model

A message says what was found, where, what was expected and what to do; the remedy is the last line, where
Ray's job view shows it. Control codes from file names or data rows are written as escapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.units import printable, printable_lines


class OrchestratorError(Exception):
    """Base of the tree.

    Args:
        what: What is wrong, with the value that was found.
        where: Place of the problem: `file:line:column`, a tensor's name, a folder. Empty if there is none.
        expected: What would be valid. Empty if `what` says it.
        remedy: What to do next; printed last.
    """

    exit_code = 4

    def __init__(self, what: str, *, where: str = "", expected: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.remedy = remedy

    @property
    def description(self) -> str:
        """Everything that the error says, without its remedy."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return printable_lines(f"{head}\n  expected: {self.expected}" if self.expected else head)

    def __str__(self) -> str:
        return f"{self.description}\n  to do: {printable_lines(self.remedy)}" if self.remedy else self.description

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(kind: type[OrchestratorError], state: dict[str, object]) -> OrchestratorError:
    error = kind.__new__(kind)
    Exception.__init__(error, str(state.get("what", "")))
    error.__dict__.update(state)
    return error


@dataclass(frozen=True)
class SpecProblem:
    """One mistake in a spec. `line` and `column` count from 1; 0 if the file has no such place."""

    path: str
    message: str
    file: str = ""
    line: int = 0
    column: int = 0
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: " if self.file else ""
        name = f"{self.path}: " if self.path else ""
        hint = f" ({self.hint})" if self.hint else ""
        return printable(f"{place}{name}{self.message}{hint}")


class SpecError(OrchestratorError, ValueError):
    """The spec is invalid; `problems` holds every mistake, all found in one pass."""

    exit_code = 2

    def __init__(self, problems: Sequence[SpecProblem]) -> None:
        count = len(problems)
        super().__init__(
            f"{count} problem{'s' if count != 1 else ''} in the spec",
            remedy="fix the lines above; `orchestrator render --schema` prints every key",
        )
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.problems), f"{self.what}; nothing was started", f"  to do: {self.remedy}"])


class DataError(OrchestratorError, ValueError):
    """A data file, row or split cannot be used."""

    exit_code = 2


class BaseError(OrchestratorError, ValueError):
    """The base cannot be used: missing or damaged weights, unsafe format, unknown layout."""

    exit_code = 2


class SelectionError(OrchestratorError, ValueError):
    """A layer policy or pattern matches nothing, or names what the base does not have."""

    exit_code = 2


class UsageError(OrchestratorError, ValueError):
    """A command was called with arguments that it cannot use."""

    exit_code = 2


class RunConflictError(OrchestratorError, FileExistsError):
    """The run's folder holds another run; nothing was overwritten."""

    exit_code = 2


class IntegrityError(OrchestratorError, OSError):
    """A file differs from its manifest: truncated, changed, or missing."""


class PlanError(OrchestratorError, RuntimeError):
    """The spec cannot run on the described cluster."""

    exit_code = 3


class TrainingError(OrchestratorError, RuntimeError):
    """Training failed."""


class CheckpointError(OrchestratorError, OSError):
    """A checkpoint could not be written; the gang has to be replaced."""


class NonFiniteLossError(TrainingError):
    """The loss or the gradient norm became NaN or infinite."""


class OutOfMemoryError(TrainingError, MemoryError):
    """Out of memory, known on every rank, so the gang survives. The trial fails if its micro-batch cannot be reduced further."""


class RankOutOfMemoryError(OrchestratorError):
    """Out of memory on one rank while the others wait for it in a collective: the gang has to be replaced.

    Not a TrainingError, since the gang survives a trial's own failure.
    """


class BaseLostError(OrchestratorError):
    """The base could not be restored after a trial: the gang has to be replaced, whatever the trial reported."""


class NothingPromotedError(OrchestratorError):
    """No trial was promoted, and `--require-promotion` asked for one."""

    exit_code = 5


class VerificationError(OrchestratorError, RuntimeError):
    """The bundle failed verification."""

    exit_code = 6
