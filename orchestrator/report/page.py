"""The report: one HTML file that needs no network and no other file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from orchestrator.report import (
    block_scores,
    domain_shift,
    held_out,
    html,
    learning_curve,
    live_page,
    run_details,
    sections,
    timeline,
    trial_table,
)
from orchestrator.report.html import Html
from orchestrator.run.layout import RunFolder
from orchestrator.run.reader import RunRecords, read_run
from orchestrator.store import output_to, write_atomic

FOLLOW_S = 5.0
"""Seconds between two versions of a followed page."""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run directory, finished or not, and return its path.

    Raises:
        UsageError: `run_folder` is not a run directory, or nothing can be written into it.
    """
    path = RunFolder(Path(run_folder)).report
    page = render_page(read_run(run_folder))
    with output_to(path, remedy="free space or grant write permission in the run's folder, or copy it elsewhere"):
        write_atomic(path, page)
    return path


def follow_run(run_folder: Path, *, every_s: float = FOLLOW_S) -> None:
    """Write `report.html` every `every_s` seconds until the run has ended; the page in the browser reloads itself.

    Raises:
        UsageError: `run_folder` is not a run directory.
    """

    def write(reload_s: float | None) -> RunRecords:
        run = read_run(run_folder)
        write_atomic(RunFolder(Path(run_folder)).report, render_page(run, reload_s=reload_s))
        return run

    live_page.follow(write, every_s=every_s)


def render_page(run: RunRecords, *, reload_s: float | None = None) -> str:
    """Return the whole page as text.

    Args:
        reload_s: Interval in seconds at which the page reloads itself; None for never.

    """
    found = _sections(run)
    style = resources.files("orchestrator.report").joinpath("style.css").read_text(encoding="utf-8")
    page = html.tag(
        "html",
        html.tag(
            "head",
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            html.tag("title", f"{run.name}: report"),
            html.tag("style", Html(style)),
            *([live_page.reloading(reload_s)] if reload_s is not None else []),
        ),
        html.tag(
            "body",
            sections.head(run),
            html.tag("nav", *(html.link(title) for title, _ in found)),
            *(html.section(title, content) for title, content in found),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _sections(run: RunRecords) -> list[tuple[str, Html]]:
    """Return titles and contents, most important first."""
    sweep, transfer = run.sweep, run.transfer
    found: list[tuple[str, Html]] = []
    if transfer is not None:
        found.append(("Gain on the test set", held_out.gains(transfer)))
    if sweep is not None:
        if sweep.job == "sweep":
            found.append(("Layers and learning rate", sections.search_map(run, sweep)))
        if run.layer_scores is not None:
            found.append(("Blocks by score", block_scores.block_scores(run, sweep, run.layer_scores)))
        if run.domain_shift is not None:
            found.append(("Domain shift", domain_shift.domain_shift(run, run.domain_shift)))
        found.append(("Target against retention", sections.trade_off(sweep)))
        if sweep.curve_of_winner is not None or sweep.no_learning_curve:
            found.append(("Would more data help?", learning_curve.more_data(sweep)))
    if transfer is not None:
        found.append(("Prompts, before and after", held_out.prompts(transfer)))
        found.append(("Bundle", run_details.bundle(run, transfer)))
    if sweep is not None:
        if run.complete or sweep.advice or transfer is not None:
            found.append(("What to try next", sections.next_steps(sweep, transfer)))
        found.append(("Loss curves", sections.loss_curves(run, sweep)))
        found.append(("Trials", trial_table.trial_table(run, sweep)))
    if run.results:
        found.append(("Worker groups (gangs) over time", timeline.gang_times(run)))
    found.append(("Plan against measured", run_details.plan_against_measured(run)))
    found.append(("Data", run_details.data_summary(run)))
    found.append(("Events", run_details.events(run)))
    found.append(("Origin", run_details.origin(run)))
    return found
