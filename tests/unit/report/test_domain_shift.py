"""What the page says of the advice: only Optuna's first trials follow it, and where none is given there is nothing to follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.report.domain_shift import domain_shift
from orchestrator.run.reader import read_run
from orchestrator.work.measurements import DomainShift


@pytest.mark.parametrize(
    ("algorithm", "prior", "follows", "own_order"),
    [("optuna", "far", True, False), ("random", "few", False, True), ("optuna", "none", False, False)],
)
def test_only_what_follows_the_advice_is_said_to(fake_run, algorithm: str, prior: str, follows: bool, own_order: bool) -> None:
    run = read_run(fake_run())
    assert run.plan is not None
    search = run.plan.search.model_copy(update={"algorithm": algorithm, "prior": prior})
    events = ({"kind": "domain_shift", "message": "so it is"},)
    run = replace(run, plan=run.plan.model_copy(update={"search": search}), events=events)
    said = str(domain_shift(run, DomainShift(failed="nobody knows")))
    assert "So it is." in said
    assert ("The first trials follow it" in said) == follows
    assert (f"keep their own order: search.algorithm is {algorithm}" in said) == own_order
