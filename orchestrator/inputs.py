"""Look at a job's inputs without running it: the plan, estimated from file sizes, and how the data is read."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.anatomy import pooled_for
from orchestrator.bases import locate_base, record_base
from orchestrator.data import DataSummary, prepare_data
from orchestrator.data.reading.measure import measure_data
from orchestrator.data.splitting.labels import label_notices, refuse_quantities
from orchestrator.errors import UsageError
from orchestrator.plan import make_plan, read_cluster_file
from orchestrator.plan.defaults import with_section
from orchestrator.plan.values import ClusterDescription, RunPlan
from orchestrator.spec import LoadedSpec, spec_sha256
from orchestrator.this_machine import describe_this_machine
from orchestrator.units import printable

Job = Literal["sweep", "finetune"]
WIDTH = 100


def plan_of(loaded: LoadedSpec, *, job: str = "", cluster_file: Path | None = None, address: str | None = None) -> RunPlan:
    """Plan a spec's job on a described cluster, on a live one, or on this machine. Data is estimated from file sizes.

    Raises:
        UsageError: `job` is neither sweep nor finetune.
        BaseError, SelectionError, DataError: the inputs cannot be used.
        PlanError: it does not fit.
    """
    spec = loaded.spec
    if job not in ("", "sweep", "finetune"):
        raise UsageError(
            f"--job is {job!r}", expected="sweep or finetune", remedy="leave it out to plan the section that the spec has"
        )
    alone = spec.search is None and spec.finetune is not None
    chosen = cast("Job", job or ("finetune" if alone else "sweep"))
    base = locate_base(spec.base, loaded.folder)
    loaded = with_section(loaded, chosen, lambda: base.anatomy(spec.task))
    spec = loaded.spec
    anatomy = pooled_for(base.anatomy(spec.task), spec)
    size, labels = measure_data(loaded)
    cluster, sha256 = cluster_of(cluster_file, address), spec_sha256(spec, chosen)
    plan = make_plan(loaded, anatomy, size, cluster, job=chosen, spec_sha256=sha256, resize=lambda step: size.with_step(*step))
    plan = record_base(plan, base)
    if labels is None:
        return plan
    refuse_quantities(labels, loaded.where("data.columns.label"))
    return plan.model_copy(update={"warnings": (*plan.warnings, *(notice.line for notice in label_notices(labels)))})


def cluster_of(cluster_file: Path | None, address: str | None) -> ClusterDescription:
    """Return the cluster of a file, the live one at `address`, or this machine."""
    if cluster_file is not None:
        return read_cluster_file(cluster_file)
    if address:
        from orchestrator.runtime import probe_cluster

        return probe_cluster(address)
    return describe_this_machine()


@dataclass(frozen=True)
class Inspection:
    """Summary of a spec's data as it was read."""

    summary: DataSummary

    def as_json(self) -> dict[str, Any]:
        return self.summary.model_dump(mode="json")

    def view(self) -> RenderableType:
        """Return counts, what was dropped and why, and one example."""
        summary = self.summary
        parts: list[RenderableType] = [_splits_table(summary), Text(), *_notices(summary)]
        if summary.classes:
            counted = zip(summary.classes, summary.class_counts, strict=True)
            parts += [
                Text("Classes in train", style="bold"),
                Text(", ".join(f"{printable(name)} {count}" for name, count in counted)),
                Text(),
            ]
        parts += [_dropped_table(summary) if summary.dropped else Text("No row was dropped."), Text()]
        parts += [
            Text("One training example; what is between « and » is supervised", style="bold"),
            _example(summary.one_example),
        ]
        return Group(*parts)


def inspect_data(loaded: LoadedSpec) -> Inspection:
    """Read, check, split and tokenise the data in a temporary folder.

    Raises:
        BaseError: the base has no tokenizer.
        DataError: the data cannot be used.
    """
    base = locate_base(loaded.spec.base, loaded.folder).for_data()
    with tempfile.TemporaryDirectory(prefix="orchestrator-data-") as folder:
        return Inspection(prepare_data(loaded, base, Path(folder)))


def _splits_table(summary: DataSummary) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for name in ("documents", "tokens", "supervised", "longest"):
        table.add_column(name, justify="right")
    for name, split in summary.splits.items():
        counts = (split.documents, split.tokens, split.supervised_tokens, split.longest_document_tokens)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _notices(summary: DataSummary) -> list[RenderableType]:
    """Return one line for each notice, warnings first, in yellow on a terminal."""
    noticed = sorted(summary.notices, key=lambda notice: notice.level != "warning")
    lines = [
        Text(f"{notice.level}: {printable(notice.line)}", style="yellow" if notice.level == "warning" else "")
        for notice in noticed
    ]
    return [*lines, Text()] if lines else []


def _dropped_table(summary: DataSummary) -> Table:
    table = Table(title="Left out", title_justify="left", title_style="bold", box=None, pad_edge=False, width=WIDTH)
    table.add_column("split", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("reason", max_width=40)
    table.add_column("where", ratio=1)
    for entry in summary.dropped:
        more = f" and {entry.count - len(entry.places)} more" if entry.count > len(entry.places) else ""
        table.add_row(
            entry.split, f"{entry.count:,}", Text(printable(entry.reason)), Text(printable(", ".join(entry.places) + more))
        )
    return table


def _example(marked: str) -> Text:
    """Return the example, with the text between the marks in green on a terminal; the marks stay, for logs. Line breaks stay,
    control codes are escaped."""
    example = Text("\n".join(map(printable, marked.split("\n"))))
    example.highlight_regex(r"(?s)«.*?»", "green")
    return example
