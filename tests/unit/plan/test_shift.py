"""The domain shift is measured where there is a retention set that the task uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan import make_plan
from orchestrator.plan.values import RunPlan


@pytest.fixture
def plan(base: Callable[[str], ModelAnatomy], data: Any, cores: Any, job: Any) -> Callable[..., RunPlan]:
    def make(task: str, **size: Any) -> RunPlan:
        loaded = job(task=task, data={"retain": "general.jsonl"})
        return make_plan(loaded, base("tiny"), data(**size), cores(2), job="sweep", spec_sha256="0" * 64)

    return make


@pytest.mark.parametrize("task", ["completion", "text"])
def test_it_is_measured_at_the_cuts_that_are_stored(plan: Any, task: str) -> None:
    found = plan(task)
    assert found.trunk is not None
    assert found.shift is not None
    assert found.shift.cuts == found.trunk.cuts


def test_without_a_retention_set_it_is_not(plan: Any) -> None:
    assert plan("completion", retain_tokens=0).shift is None


@pytest.mark.parametrize("documents", [100, 5000])
def test_a_classifier_uses_no_retention_set(plan: Any, documents: int) -> None:
    found = plan("classify", num_classes=3, train_documents=documents)
    assert found.data.retain_tokens > 0
    assert found.shift is None
