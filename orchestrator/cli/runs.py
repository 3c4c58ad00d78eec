"""`orchestrator runs` and `compare`: list the runs in a folder, and compare runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.output import AsJson, print_json, print_rich


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder that holds the runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs of a folder: state, verdict, best trial, size."""
    from orchestrator.report.listing import list_runs, runs_view

    found = list_runs(folder)
    if as_json:
        print_json([line.model_dump(mode="json") for line in found])
    elif found:
        print_rich(runs_view(found))
    else:
        print(f"no run in {folder}")


def compare(
    run: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="The runs' folders, two or more.")],
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: what differs in their specs, and what they found."""
    from orchestrator.report.listing import compare_runs, comparison_view

    compared = compare_runs(run)
    if as_json:
        print_json(compared.model_dump(mode="json"))
    else:
        print_rich(comparison_view(compared))
