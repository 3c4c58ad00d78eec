"""Table of planned and measured memory per rank, one row for each choice of the search."""

from __future__ import annotations

from orchestrator.report import html
from orchestrator.report.html import Html
from orchestrator.report.wording import MISSING
from orchestrator.transfer import memory_rows
from orchestrator.transfer.records import MemoryRow, SweepResult
from orchestrator.units import format_bytes

ON_A_GPU = (
    "Measured is the peak of torch's allocator on each rank during training and scoring. The CUDA context, the collectives' "
    "buffers and the allocator's reserve are not in it, but are in the planned figure. A ratio somewhat below 1 is expected; "
    "above 1 the plan is too small, and a step with longer documents may run out of memory."
)
ON_A_CPU = (
    "On a CPU measured is the resident memory of the process, read after every step and after scoring. It includes libraries, "
    "the mapped base model and memory that the allocator kept from earlier trials, and excludes activations that a step has "
    "freed: it shows the order of magnitude only."
)
MANY_RANKS = 8
"""Number of ranks above which the table shows only minimum and maximum."""


def memory_table(sweep: SweepResult) -> Html:
    """Return the table; empty if no trial has measured anything."""
    rows = memory_rows(sweep.trials)
    if not rows:
        return Html()
    cells = [
        [
            row.label,
            row.num_trials,
            _micro_batch(row),
            format_bytes(row.predicted_bytes) if row.predicted_bytes else MISSING,
            format_bytes(row.measured_bytes) if row.measured_bytes else MISSING,
            _by_rank(row),
            f"{row.ratio:.2f}x" if row.ratio is not None else MISSING,
        ]
        for row in rows
    ]
    headers = ["choice", "trials", "micro-batch", "planned per rank", "measured, most", "by rank", "measured / planned"]
    table = html.table(headers, cells, numeric=(1, 3, 4, 6))
    said = ON_A_GPU if any(row.device == "cuda" for row in rows) else ON_A_CPU
    return html.join([html.tag("h3", "Memory per rank"), table, html.paragraph(said)])


def _micro_batch(row: MemoryRow) -> str:
    rows = f"{row.micro_batch_rows} row{'' if row.micro_batch_rows == 1 else 's'}"
    now = f"{rows}, checkpointing" if row.checkpointing else rows
    if not row.num_out_of_memory:
        return now
    if row.num_failed_for_memory == row.num_trials:
        return "out of memory; could not be reduced further"
    went_on = f"out of memory; retried with {now}"
    return f"{went_on} ({row.num_failed_for_memory} failed)" if row.num_failed_for_memory else went_on


def _by_rank(row: MemoryRow) -> str:
    peaks = row.rank_peak_bytes
    if not peaks:
        return MISSING
    if len(peaks) > MANY_RANKS:
        return f"{format_bytes(min(peaks))} to {format_bytes(max(peaks))} on {len(peaks)} ranks"
    return " · ".join(map(format_bytes, peaks))
