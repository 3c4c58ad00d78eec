"""A plan is a sweep's or a fine-tuning's, also when it is read again."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from orchestrator.plan.values import FinetunePlan, RunPlan, SweepPlan
from tests.unit.fake_run import make_plan


@pytest.mark.parametrize(("search", "kind"), [(True, SweepPlan), (False, FinetunePlan)])
def test_a_plan_is_read_as_the_kind_that_it_is(search: bool, kind: type[RunPlan]) -> None:
    plan = make_plan(search=search)
    values = json.loads(plan.model_dump_json())
    assert (values["search"] is None, values["finetune"] is None) == (not search, search), "older versions read both keys"
    found = RunPlan.model_validate(values)
    assert isinstance(found, kind)
    assert found == plan
    assert found.options == plan.options


def without(*names: str) -> Callable[[dict[str, object]], dict[str, object]]:
    return lambda values: {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("damaged", [without("execution"), without("search", "finetune")])
def test_a_plan_of_neither_kind_is_refused(damaged: Callable[[dict[str, object]], dict[str, object]]) -> None:
    with pytest.raises(ValidationError) as told:
        RunPlan.model_validate(damaged(json.loads(make_plan().model_dump_json())))
    assert "\n" not in told.value.errors()[0]["msg"]
