"""What a gang answers, and what older versions wrote of it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from orchestrator.work.results import RungResult

RUNG = RungResult(trial_id="t000-abc", rung=0, step=4, tokens=10, state="done")


def test_a_record_of_an_older_version_is_read() -> None:
    former = {"layer_scores": None, "domain_shift": None, "compile_times": None}
    assert RungResult.model_validate({**RUNG.model_dump(mode="json"), **former}) == RUNG


def test_a_record_with_a_measurement_in_it_is_no_rung() -> None:
    with pytest.raises(ValidationError, match="layer_scores"):
        RungResult.model_validate({**RUNG.model_dump(mode="json"), "layer_scores": {"num_batches": 1}})
