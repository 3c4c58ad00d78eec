"""One exception tree: picklable, with exit codes, the remedy last."""

from __future__ import annotations

import inspect
import pickle

import pytest

from orchestrator import errors
from orchestrator.errors import BaseError, OrchestratorError, SpecError, SpecProblem

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, OrchestratorError) and kind is not SpecError
]
EXIT_CODES = {
    "OrchestratorError": 4,
    "SpecError": 2,
    "DataError": 2,
    "BaseError": 2,
    "SelectionError": 2,
    "UsageError": 2,
    "RunConflictError": 2,
    "IntegrityError": 4,
    "PlanError": 3,
    "TrainingError": 4,
    "CheckpointError": 4,
    "NonFiniteLossError": 4,
    "OutOfMemoryError": 4,
    "RankOutOfMemoryError": 4,
    "BaseLostError": 4,
    "NothingPromotedError": 5,
    "VerificationError": 6,
}


def test_exit_codes_are_the_documented_ones() -> None:
    assert {kind.__name__: kind.exit_code for kind in [*KINDS, SpecError]} == EXIT_CODES
    assert errors.__doc__ is not None
    for name, code in EXIT_CODES.items():
        if name != "OrchestratorError":
            (line,) = [line for line in errors.__doc__.splitlines() if f" {name} " in line]
            assert line.split(name)[1].split()[0] == str(code)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind: type[OrchestratorError]) -> None:
    error = kind("3 blocks", where="spec.yaml:4:2", expected="at most 2", remedy="write last:2")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.what, again.where, again.expected, again.remedy) == ("3 blocks", "spec.yaml:4:2", "at most 2", "write last:2")


def test_a_spec_error_survives_pickling_with_all_its_problems() -> None:
    problems = [SpecProblem("train.epochs", "found 0", "s.yaml", 3, 9, "write 1"), SpecProblem("name", "is missing", "s.yaml")]
    again = pickle.loads(pickle.dumps(SpecError(problems)))
    assert again.problems == tuple(problems)
    assert str(again).splitlines() == [
        "s.yaml:3:9: train.epochs: found 0 (write 1)",
        "s.yaml: name: is missing",
        "2 problems in the spec; nothing was started",
        "  to do: fix the lines above; `orchestrator render --schema` prints every key",
    ]


def test_the_remedy_comes_last() -> None:
    error = BaseError("truncated: 3 bytes", where="model.safetensors", expected="9 bytes", remedy="copy it again")
    assert str(error).splitlines() == ["model.safetensors: truncated: 3 bytes", "  expected: 9 bytes", "  to do: copy it again"]


def test_what_the_standard_library_catches_catches_ours() -> None:
    assert issubclass(SpecError, ValueError)
    assert issubclass(errors.OutOfMemoryError, MemoryError)
    assert issubclass(errors.IntegrityError, OSError)
