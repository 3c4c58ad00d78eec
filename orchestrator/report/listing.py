"""List the runs of a folder, one line each, and compare several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.report.wording import best_trial, measured_of, metric_text, number, score_text, signed
from orchestrator.run.directory import as_today, running_driver
from orchestrator.run.layout import IDENTITY
from orchestrator.run.reader import RunRecords, find_runs, num_bytes_of, promoted_losses, read_run
from orchestrator.spec import describe_difference
from orchestrator.spec.tasks import loss_unit
from orchestrator.transfer import paired_comparison
from orchestrator.transfer.records import CONTROL_NAMES, ModelScores
from orchestrator.units import format_bytes, format_seconds, printable
from orchestrator.values import Value

State = Literal["finished", "running", "interrupted", "not planned", "damaged"]
NONE = "-"


class RunLine(Value):
    """One run in a list."""

    name: str
    folder: str
    job: str = ""
    state: State
    verdict: str | None = None
    best: str = ""
    """The promoted trial, or the best one so far."""
    metric: str = ""
    value: float | None = None
    """The metric of `best` on the eval set."""
    started_at: float | None = None
    """Unix time of the first submission."""
    trials: int = 0
    """Number of searched trials that have started."""
    num_bytes: int = 0
    """Size on disk; a file with several hard links counts once."""
    problem: str = ""
    """Description of what could not be read; empty if everything could."""


def list_runs(folder: Path) -> list[RunLine]:
    """Return every run in `folder`, or `folder` itself where it is one; the newest last.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        remedy = "give the folder that holds the runs; the spec's `output` names it, `runs` unless given"
        raise UsageError("no such folder", where=str(folder), expected="a folder of runs", remedy=remedy)
    return sorted(map(describe_run, find_runs(folder)), key=lambda line: line.started_at or 0.0)


def describe_run(folder: Path) -> RunLine:
    """Summarise a run by its records; a run that cannot be read is listed as damaged."""
    size = num_bytes_of(folder)
    try:
        records = read_run(folder)
    except (OrchestratorError, OSError) as error:
        return RunLine(name=folder.name, folder=str(folder), state="damaged", num_bytes=size, problem=str(error).splitlines()[0])
    if records.created is None:
        problem = next((gap for gap in records.gaps if IDENTITY in gap), f"{IDENTITY} does not say when the run was created")
        return RunLine(name=folder.name, folder=str(folder), state="damaged", num_bytes=size, problem=problem)
    sweep, transfer = records.sweep, records.transfer
    best = (sweep.winner or best_trial(sweep.searched, sweep.higher_is_better)) if sweep else None
    return RunLine(
        name=records.name,
        folder=str(folder),
        job=sweep.job if sweep else "",
        state=state_of(folder, records),
        verdict=transfer.verdict if transfer else None,
        best=best.label if best else "",
        metric=sweep.metric if sweep else "",
        value=measured_of(best, transfer).metric if best else None,
        started_at=records.created,
        trials=len(sweep.searched) if sweep else 0,
        num_bytes=size,
        problem="; ".join(records.gaps),
    )


def state_of(folder: Path, records: RunRecords) -> State:
    """Return whether a driver is running the run, it has finished, or it can be continued by submitting it again."""
    if running_driver(folder):
        return "running"
    if records.complete:
        return "finished"
    return "interrupted" if records.plan is not None else "not planned"


def runs_view(lines: Sequence[RunLine]) -> RenderableType:
    """Return the table of `orchestrator runs`."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "state", "verdict", "best"):
        table.add_column(name, overflow="fold", no_wrap=name in ("state", "verdict"))
    for name in ("figure", "trials", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("started (UTC)", no_wrap=True)
    for line in lines:
        began = datetime.fromtimestamp(line.started_at, UTC).strftime("%Y-%m-%d %H:%M") if line.started_at else NONE
        figure = f"{line.metric} {metric_text(line.value, line.metric)}" if line.value is not None else NONE
        best = printable(line.best or line.problem) or NONE
        counted = (f"{line.trials}", format_bytes(line.num_bytes))
        table.add_row(Text(printable(line.name)), line.state, line.verdict or NONE, Text(best), figure, *counted, began)
    return table


class RunsCompared(Value):
    """Several runs side by side."""

    runs: tuple[str, ...]
    """Names; the folders where two names are the same."""
    spec: tuple[tuple[str, tuple[str, ...]], ...]
    """Keys whose values differ, with the value of each run."""
    figures: tuple[tuple[str, tuple[str, ...]], ...]
    """Names of the results, with the value of each run."""
    comparable: bool
    reasons: tuple[str, ...]
    """Why the figures are not comparable; empty where they are."""
    differences: tuple[str, ...] = ()
    """Paired differences of the promoted models on the shared test set, the first run against each other one."""


def compare_runs(folders: Sequence[Path]) -> RunsCompared:
    """Compare runs side by side.

    Raises:
        UsageError: fewer than two runs, the same run twice, or a folder that is not a run.
    """
    if len(folders) < 2:
        raise UsageError("one run cannot be compared", expected="two runs or more", remedy="orchestrator compare RUN RUN")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("the same run is given twice", where=" ".join(map(str, folders)), expected="different runs")
    records = [read_run(folder) for folder in folders]
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    reasons = tuple(_reasons(records))
    unit = loss_unit(records[0].sweep.task if records[0].sweep is not None else "")
    return RunsCompared(
        runs=tuple(names),
        spec=tuple(_spec_differences(records)),
        figures=tuple(_figures(folders, records)),
        comparable=not reasons,
        reasons=reasons,
        differences=() if reasons else tuple(_paired(folders, names, unit)),
    )


def _spec_differences(records: Sequence[RunRecords]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the keys whose values differ between the resolved specs."""
    values = [as_today(record.identity.get("values", {})) for record in records]
    lines = [describe_difference(one, other) for one, other in pairwise([*values, values[0]])]
    keys = dict.fromkeys(line.partition(": ")[0] for found in lines for line in found if not line.startswith("name:"))
    # A parent key is left out if one of its children is listed.
    parts = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    return [(key, tuple(_value_at(value, key) for value in values)) for key in parts]


def _value_at(values: Any, key: str) -> str:
    for step in key.split("."):
        if not isinstance(values, dict) or step not in values:
            return "(absent)"
        values = values[step]
    return "null" if values is None else str(values).lower() if isinstance(values, bool) else printable(str(values))


def _reasons(records: Sequence[RunRecords]) -> list[str]:
    """Return why the figures on the test set are not comparable."""
    said: list[str] = []
    tests = [record.data_summary.get("splits", {}).get("test", {}) for record in records]
    hashes = {test.get("sha256") for test in tests}
    if None in hashes:
        said.append("a run has no test set yet")
    elif len(hashes) > 1:
        counts = " and ".join(f"{test.get('documents', 0):,}" for test in tests)
        said.append(f"the test sets differ (of {counts} documents, or tokenised differently): their figures cannot be compared")
    if len({record.sweep.task for record in records if record.sweep}) > 1:
        said.append("the tasks differ")
    if any(record.transfer is None or not record.transfer.scores for record in records):
        said.append("a run has not been judged on its test set")
    return said


def _figures(folders: Sequence[Path], records: Sequence[RunRecords]) -> list[tuple[str, tuple[str, ...]]]:
    rows: dict[str, list[str]] = {}
    for folder, record in zip(folders, records, strict=True):
        found = dict(_figures_of(folder, record))
        for name in dict.fromkeys([*rows, *found]):
            column = rows.setdefault(name, [NONE] * folders.index(folder))
            column.append(found.get(name, NONE))
    return [(name, tuple(column)) for name, column in rows.items()]


def _figures_of(folder: Path, record: RunRecords) -> list[tuple[str, str]]:
    sweep, transfer = record.sweep, record.transfer
    said: list[tuple[str, str]] = [("state", state_of(folder, record))]
    if transfer is not None:
        said.append(("verdict", transfer.verdict or "nothing promoted"))
    if sweep is not None:
        best = sweep.winner or best_trial(sweep.searched, sweep.higher_is_better)
        found = measured_of(best, transfer) if best else None
        said.append(("promoted" if sweep.winner else "best trial", best.label if best else NONE))
        said.append((f"{sweep.metric}, eval set", metric_text(found.metric if found else None, sweep.metric)))
        said.append(("forgetting", signed(found.forgetting) if found else NONE))
        said.append(("trials", str(len(sweep.searched))))
        said.append(("time", format_seconds(sweep.wall_seconds)))
    if transfer is not None:
        scores = {score.model: score for score in transfer.scores}
        said += _test_scores(scores)
        said += [
            (
                f"gain over {CONTROL_NAMES[comparison.against]}, test set",
                f"{comparison.mean:.3f} [{comparison.low:.3f}, {comparison.high:.3f}]",
            )
            for comparison in transfer.comparisons
        ]
    return said


def _test_scores(scores: dict[str, ModelScores]) -> list[tuple[str, str]]:
    """Return the test scores of the promoted model, with the base model's beside them."""
    promoted, base = scores.get("promoted"), scores.get("none")
    if promoted is None:
        return []
    rows: list[tuple[str, str]] = []
    for metric in promoted.metrics:
        before = f" (base {metric_text(base.metrics[metric], metric)})" if base and metric in base.metrics else ""
        rows.append((f"{metric}, test set", score_text(promoted, metric) + before))
    return rows


def _paired(folders: Sequence[Path], names: Sequence[str], unit: str) -> list[str]:
    """Compare the first run's promoted model with each other run's, document by document."""
    losses = [promoted_losses(folder) for folder in folders]
    said: list[str] = []
    for name, other in zip(names[1:], losses[1:], strict=True):
        first = losses[0]
        # The weights are the token counts: equal ones show that the documents are the same and in the same order.
        if first is None or other is None or not np.array_equal(first[1], other[1]):
            continue
        found = paired_comparison(first[0], other[0], first[1])
        sure = "better" if found.low > 0 else "worse" if found.high < 0 else "not significantly different"
        said.append(f"{names[0]} against {name}: {signed(found.mean)} {unit} [{number(found.low)}, {number(found.high)}], {sure}")
    return said


def comparison_view(compared: RunsCompared) -> RenderableType:
    """Return the screen of `orchestrator compare`."""
    parts: list[RenderableType] = []
    if not compared.comparable:
        parts += [Text(f"NOT COMPARABLE: {reason}", style="bold yellow") for reason in compared.reasons] + [Text()]
    parts += [_side_by_side("found", compared.runs, compared.figures), Text()]
    parts += [Text(f"difference   {line}") for line in compared.differences]
    if compared.differences:
        parts.append(Text("             paired by document of the test set, positive is better, with the 95% interval\n"))
    parts.append(_side_by_side("spec", compared.runs, compared.spec) if compared.spec else Text("The specs are the same."))
    return Group(*parts)


def _side_by_side(title: str, names: Sequence[str], rows: Sequence[tuple[str, tuple[str, ...]]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for name in names:
        table.add_column(Text(printable(name)), overflow="fold")
    for key, values in rows:
        table.add_row(Text(key), *(Text(value) for value in values))
    return table
