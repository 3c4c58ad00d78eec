"""Without a retention set nothing is measured, and few examples are advice all the same."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

from orchestrator.report.terminal import LogView
from orchestrator.runtime.measurements import TargetShift, measure_once
from orchestrator.runtime.prepare import Prepared
from orchestrator.work.assignment import Measurement
from orchestrator.work.results import MeasurementResult


def test_few_examples_order_the_search_without_a_retention_set(submit: Callable[..., Prepared], shown: io.StringIO) -> None:
    def measure(work: Measurement) -> MeasurementResult:
        raise AssertionError("there is nothing to measure")

    prepared = submit()
    assert prepared.plan.shift is None
    for _ in range(2):
        advised = measure_once(TargetShift(prepared), LogView(shown), measure).plan
        assert advised.search is not None
        assert advised.search.prior == "few"
    assert shown.getvalue().count("few examples: the head or few blocks first") == 1, "said once in a run's life"
    many = prepared.plan.model_copy(update={"data": prepared.plan.data.model_copy(update={"train_documents": 501})})
    assert measure_once(TargetShift(replace(prepared, plan=many)), LogView(shown), measure).plan == many
