"""What a gang answers, and what older versions wrote of it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.results import RungResult

RUNG = RungResult(trial_id="t000-abc", rung=0, step=4, tokens=10, state="done")


def test_a_record_of_an_older_version_is_read() -> None:
    former = {"layer_scores": None, "domain_shift": None, "compile_times": None}
    assert RungResult.model_validate({**RUNG.model_dump(mode="json"), **former}) == RUNG


def test_a_record_with_a_measurement_in_it_is_no_rung() -> None:
    with pytest.raises(ValidationError, match="layer_scores"):
        RungResult.model_validate({**RUNG.model_dump(mode="json"), "layer_scores": {"num_batches": 1}})


FAILED = RUNG.model_copy(update={"state": "failed", "failure": Failure(kind="data", message="no rows", remedy="give it some")})


def test_a_record_has_the_failure_and_its_text() -> None:
    record = FAILED.model_dump(mode="json")
    assert record["failure"] == {"kind": "data", "message": "no rows", "remedy": "give it some"}
    assert record["reason"] == "no rows\n  to do: give it some"
    assert RungResult.model_validate(record) == FAILED
    assert RUNG.model_dump(mode="json")["reason"] == ""


@pytest.mark.parametrize(
    ("reason", "out_of_memory"),
    [
        ("the training loss became nan", False),
        ("", False),
        ("out of memory: 3 GiB; memory use cannot be reduced further in this gang\n  to do: resources.zero: 3", True),
        ("out of memory: 3 GiB; no smaller way is left in this gang\n  to do: resources.zero: 3", True),
    ],
)
def test_a_failure_that_an_older_version_recorded_as_text_is_read(reason: str, out_of_memory: bool) -> None:
    former = {"trial_id": "t000-abc", "rung": 0, "step": 4, "tokens": 10, "state": "failed", "reason": reason}
    result = RungResult.model_validate(former)
    assert result.reason == reason
    assert result.failed_for_memory is result.ran_out_of_memory is out_of_memory
    assert RungResult.model_validate(result.model_dump(mode="json")) == result


def test_a_reduced_execution_keeps_its_key_on_disk() -> None:
    execution = ExecutionPlan(device="cpu", ranks=1, threads_per_rank=1, executor="torch", row_tokens=64, micro_batch_rows=2)
    reduced = RUNG.model_copy(update={"reduced_execution": execution})
    record = reduced.model_dump(mode="json")
    assert record["relieved"] == execution.model_dump(mode="json")
    assert "reduced_execution" not in record
    assert RungResult.model_validate(record) == reduced
    assert reduced.ran_out_of_memory
    assert not reduced.failed_for_memory
