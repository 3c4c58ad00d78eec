"""Domain shift section: distance between target and retention set, and the recommended search order."""

from __future__ import annotations

from orchestrator.plan.values import SweepPlan
from orchestrator.report import html
from orchestrator.report.html import Html
from orchestrator.report.wording import plural
from orchestrator.run.reader import RunRecords
from orchestrator.work.measurements import DomainShift


def domain_shift(run: RunRecords, found: DomainShift) -> Html:
    """Return the recommendation with its figures, and the distance at each block."""
    told = next((str(event["message"]) for event in reversed(run.events) if event.get("kind") == "domain_shift"), "")
    parts = [html.paragraph(f"{told[:1].upper()}{told[1:]}.{_followed(run)}")] if told else []
    if not found.blocks:
        return html.join([*parts, html.paragraph(f"It could not be measured: {found.failed}")])
    caption = (
        f"Proxy A-distance between {plural(found.target_documents, 'training document')} and "
        f"{found.retention_documents} of the retention set, by the mean of a block's input: 0 where a linear probe cannot "
        "distinguish them, 2 where it always can."
    )
    rows = [[block.cut, f"{block.distance:.2f}", f"{block.low:.2f} to {block.high:.2f}"] for block in found.blocks]
    table = html.table(["block", "distance", "95% interval"], rows, numeric=range(2))
    return html.join([*parts, html.paragraph(caption), table])


def _followed(run: RunRecords) -> str:
    """Return how the search used the recommendation: only `optuna` chooses its first trials by it."""
    search = run.plan.search if isinstance(run.plan, SweepPlan) else None
    if search is None or search.prior == "none":
        return ""
    if search.algorithm != "optuna":
        return f" The trials keep their own order: search.algorithm is {search.algorithm}."
    return " The first trials follow it; no choice is excluded."
