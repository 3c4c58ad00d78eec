"""The domain shift before the search, once in a run's life: domain_shift.json says what was found, and it orders the search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.plan import shift_trial
from orchestrator.plan.few import has_few
from orchestrator.plan.shift import NO_RETENTION_SET, DomainShift
from orchestrator.runtime.cluster import fetch
from orchestrator.runtime.ledger import Ledger
from orchestrator.runtime.measuring import Measure, measured
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.records import base_result
from orchestrator.store import read_record, write_json
from orchestrator.transfer.domain_shift import Advice, advise
from orchestrator.transfer.view import RunView


def advised_by_shift(prepared: Prepared, exchange: Any, view: RunView) -> Prepared:
    """The run with its first proposals ordered by what was measured. Without a retention set nothing is measured: few examples
    order them all the same, and more change nothing.
    """
    plan = prepared.plan
    file = prepared.run.domain_shift
    if plan.search is None or (plan.shift is None and not has_few(plan.data)):
        return prepared
    known = read_record(file, DomainShift) if file.exists() else None
    found = known or _measured(prepared, lambda assignment: fetch(exchange.probe.remote(assignment)))
    advice = advice_of(prepared, found)
    if known is None:
        write_json(file, found)
        view.event("domain_shift", advice.sentence)
        prepared.run.event("domain_shift", message=advice.sentence, **found.model_dump(mode="json"))
    search = plan.search.model_copy(update={"prior": advice.kind})
    plan = plan.model_copy(update={"search": search})
    write_json(prepared.run.plan, plan)
    fetch(exchange.replan.remote(plan))
    return replace(prepared, plan=plan)


def advice_of(prepared: Prepared, found: DomainShift) -> Advice:
    base = base_result(Ledger(prepared.run.trials))
    return advise(
        [block.distance for block in found.blocks],
        target_loss=base.eval_loss if base is not None else None,
        retention_loss=base.retain_loss if base is not None else None,
        num_documents=prepared.plan.data.train_documents,
        failed=found.failed,
    )


def _measured(prepared: Prepared, measure: Measure) -> DomainShift:
    if prepared.plan.shift is None:
        return DomainShift(failed=NO_RETENTION_SET)
    trial, nothing = shift_trial(prepared.plan, prepared.anatomy, prepared.spec.train.seed)
    assignment = prepared.assignment(trial, nothing, folder=prepared.run.path, stop_step=0, shift=prepared.plan.shift)
    result = measured(prepared, assignment, measure)
    return result.domain_shift or DomainShift(failed=result.reason)
