"""A failure as a value: its kind by error type, its text that of the error; old texts are read once, in one place."""

from __future__ import annotations

import pytest

from orchestrator.errors import (
    BaseError,
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
from orchestrator.work.failure import Failure
from orchestrator.work.memory_ladder import ReducedWork


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError, "out_of_memory"),
        (RankOutOfMemoryError, "out_of_memory"),
        (NonFiniteLossError, "non_finite"),
        (TrainingError, "training"),
        (DataError, "data"),
        (IntegrityError, "integrity"),
        (SelectionError, "selection"),
        (UsageError, "usage"),
        (BaseError, "other"),
    ],
)
def test_the_kind_follows_the_type_and_the_text_is_the_errors(error: type[OrchestratorError], kind: str) -> None:
    raised = error("bad \x1b[31m row", where="a.jsonl:3", expected="text\nor numbers", remedy="fix\x00 it")
    failure = Failure.of(raised)
    assert failure.kind == kind
    assert str(failure) == str(raised)
    assert str(Failure.of(error("bad"))) == "bad"


def test_reduced_work_that_an_older_version_gave_up_has_a_failure() -> None:
    reason = "out of memory on rank 1; no smaller way is left in this gang"
    given_up = ReducedWork.model_validate({"execution": None, "notes": ["a"], "reason": reason})
    assert given_up.failure == Failure(kind="out_of_memory", message=reason)
    assert ReducedWork.model_validate(given_up.model_dump(mode="json")) == given_up
