"""Without a retention set nothing is measured, and few examples are advice all the same."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.report.terminal import LogView
from orchestrator.runtime import measurements as domain
from orchestrator.runtime.prepare import Prepared


def test_few_examples_order_the_search_without_a_retention_set(
    submit: Callable[..., Prepared], shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    exchange = SimpleNamespace(replan=SimpleNamespace(remote=told.append))
    monkeypatch.setattr(domain, "fetch", lambda answer: answer)
    prepared = submit()
    assert prepared.plan.shift is None
    for _ in range(2):
        advised = domain.advised_by_shift(prepared, exchange, LogView(shown)).plan
        assert advised.search is not None
        assert advised.search.prior == "few"
        assert told.pop() == advised
    assert shown.getvalue().count("few examples: the head or few blocks first") == 1, "said once in a run's life"
    many = prepared.plan.model_copy(update={"data": prepared.plan.data.model_copy(update={"train_documents": 501})})
    assert domain.advised_by_shift(replace(prepared, plan=many), exchange, LogView(shown)).plan == many
