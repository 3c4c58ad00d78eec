"""Detail sections: the bundle, plan and measurements, data, events, versions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from orchestrator.data.summary import DataSummary
from orchestrator.report import figures, html
from orchestrator.report.figures import PlannedBar
from orchestrator.report.html import Html
from orchestrator.report.memory import memory_table
from orchestrator.report.wording import (
    MISSING,
    amount,
    engine_text,
    number,
    plural,
    ratio,
)
from orchestrator.run.reader import RunRecords
from orchestrator.spec.tasks import loss_unit
from orchestrator.transfer.records import SweepResult, TransferReport
from orchestrator.units import GIB, MIB, format_bytes, format_count, format_seconds

MAX_EVENTS = 400
MAX_BARS = 16


def bundle(run: RunRecords, transfer: TransferReport) -> Html:
    """Return the bundle section: its path and its verification."""
    if transfer.bundle is None:
        return html.paragraph("There is no bundle: nothing was promoted.")
    rows: list[tuple[object, object]] = [("folder", transfer.bundle)]
    check = transfer.verification
    if check is not None:
        outcome = "passed" if check.passed else "FAILED"
        unit = loss_unit(run.sweep.task if run.sweep is not None else "")
        rows += [
            ("verification", f"{outcome} on {check.num_prompts} held-out prompts in {format_seconds(check.seconds)}"),
            ("KL(trained || bundle)", f"{number(check.kl_bundle)} {unit}, at most {number(check.limit)} allowed"),
            ("KL(trained || base)", f"{number(check.kl_base)} {unit}"),
            ("merged into", f"the {check.merged_into} base" if check.merged_into else MISSING),
        ]
    if transfer.refit is not None:
        rows.append(("refit", _refit(transfer)))
    files = run.bundle_manifest.get("files")
    if files:
        rows.append(("files in its manifest", len(files)))
    commands = html.join(html.tag("pre", command) for command in transfer.serve_commands)
    return html.join([html.facts(rows), *((html.tag("h3", "Serve it"), commands) if transfer.serve_commands else ())])


def _refit(transfer: TransferReport) -> str:
    refit = transfer.refit
    assert refit is not None
    if not refit.ran:
        return f"not needed: {refit.reason}"
    restarts = f", restarted {plural(refit.restarts, 'time')}" if refit.restarts else ""
    engine = engine_text(refit.executor, refit.zero_stage, refit.ranks)
    return f"to step {refit.to_step} in {format_seconds(refit.seconds)} on {engine}{restarts}: {refit.reason}"


def plan_against_measured(run: RunRecords) -> Html:
    """Return planned and measured memory and time, and the reasons for the plan."""
    parts: list[object] = []
    bars = _memory_bars(run)
    if bars:
        scale, unit = (GIB, "GiB") if max(sum(size for _, size in bar.terms) for bar in bars) > 2 * GIB else (MIB, "MiB")
        names = list(dict.fromkeys(name for bar in bars for name, _ in bar.terms))
        rows = [
            [
                bar.label,
                *(format_bytes(dict(bar.terms).get(name, 0.0)) for name in names),
                format_bytes(sum(size for _, size in bar.terms)),
                format_bytes(bar.measured) if bar.measured else MISSING,
            ]
            for bar in bars
        ]
        data = html.table(["choice", *names, "planned", "measured peak"], rows, numeric=range(1, len(names) + 3))
        parts.append(
            html.picture(
                figures.memory(bars, scale, unit), "Memory of one rank as planned, term by term, and the measured peak.", data
            )
        )
    if run.sweep is not None:
        parts.append(memory_table(run.sweep))
    measured = run.transfer.plan_against_measured if run.transfer else ()
    if measured:
        rows = [[row.name, amount(row.planned, row.unit), amount(row.measured, row.unit), ratio(row)] for row in measured]
        parts.append(html.table(["", "planned", "measured", "measured / planned"], rows, numeric=(1, 2, 3)))
    if run.sweep is not None:
        parts.append(html.facts(_gang_facts(run.sweep)))
    if run.plan is not None:
        parts.append(html.tag("h3", "Why this plan"))
        parts.append(html.bullets((*run.plan.reasons, *run.plan.notes)))
        if run.plan.rejected:
            rows = [[way.way, way.reason] for way in run.plan.rejected]
            parts.append(html.table(["rejected", "because"], rows))
    return html.join(parts or [html.paragraph("There is no plan yet.")])


def _memory_bars(run: RunRecords) -> list[PlannedBar]:
    plan = run.plan
    if plan is None:
        return []
    options = plan.options
    bars = []
    for option in options[:MAX_BARS]:
        peaks = [
            trial.engine.peak_memory_bytes
            for trial in (run.sweep.trials if run.sweep else ())
            if trial.engine and (trial.layers, trial.method) == (option.layers, option.method)
        ]
        terms = tuple((term.name, float(term.num_bytes)) for term in option.memory.terms)
        bars.append(PlannedBar(f"{option.layers} · {option.method}", terms, max(peaks, default=0) or None))
    return bars


def _gang_facts(sweep: SweepResult) -> list[tuple[object, object]]:
    ranks = f"{sweep.num_gangs} of {plural(sweep.ranks_per_gang, 'rank')} each"
    engines = sorted({engine_text(t.engine.executor, t.engine.zero_stage, t.engine.ranks) for t in sweep.trials if t.engine})
    first = format_seconds(sweep.first_trial_seconds) if sweep.first_trial_seconds is not None else MISSING
    return [
        ("worker groups (gangs)", ranks + (f", {sweep.gangs_replaced} replaced" if sweep.gangs_replaced else "")),
        ("base model loads", sweep.base_loads),
        ("engines used", "; ".join(engines) or MISSING),
        ("trials trained in shared batches", sum(t.engine is not None and t.engine.fused_trials > 1 for t in sweep.trials)),
        ("trials with compiled blocks", sum(t.engine is not None and t.engine.compiled for t in sweep.trials)),
        ("first trial's first step after", first),
        ("gang time idle between trials", format_seconds(sweep.gang_idle_seconds)),
        ("submissions", sweep.num_submissions),
        ("GPU-hours used (without GPUs: rank-hours)", _hours(sweep)),
    ]


def _quantized(quantize: str) -> str:
    return "not quantized" if quantize == "none" else f"quantized to {quantize}"


def _hours(sweep: SweepResult) -> str:
    bound = f" of {sweep.max_gpu_hours:g}" if sweep.max_gpu_hours is not None else ""
    return number(sweep.gpu_hours_used) + bound


def data_notices(run: RunRecords) -> Html:
    """Return the notices about the data, one line each: warnings shown, the rest folded; empty without notices."""
    try:
        told = DataSummary.model_validate(run.data_summary).told
    except ValidationError:
        return html.join(())
    warnings = [notice.line for notice in told if notice.level == "warning"]
    others = [notice.line for notice in told if notice.level != "warning"]
    parts: list[Html] = []
    if warnings:
        parts.append(html.tag("div", html.tag("strong", "The data:"), html.bullets(warnings), css="warning"))
    if others:
        parts.append(html.details(f"The data: {plural(len(others), 'note')}", html.bullets(others)))
    return html.join(parts)


def data_summary(run: RunRecords) -> Html:
    if not run.data_summary:
        return html.paragraph("The data has not been read yet.")
    return _tree(run.data_summary)


def _tree(values: Mapping[str, Any]) -> Html:
    """Return nested records as nested lists of facts; long lists are folded."""
    return html.facts((name.replace("_", " "), _leaf(value)) for name, value in values.items())


def _leaf(value: Any) -> object:
    if isinstance(value, Mapping):
        return _tree(value) if value else MISSING
    if isinstance(value, list | tuple):
        if not value:
            return MISSING
        if all(isinstance(item, Mapping) for item in value) and len({tuple(item) for item in value}) == 1:
            written = html.table(list(value[0]), [[_leaf(cell) for cell in item.values()] for item in value])
        else:
            written = html.bullets(_leaf(item) for item in value)
        return written if len(value) <= 8 else html.details(f"{len(value)} entries", written)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else value


def events(run: RunRecords) -> Html:
    """Return the automatic actions that the run record holds."""
    if not run.events:
        return html.paragraph("No events yet.")
    rows = []
    for event in run.events[-MAX_EVENTS:]:
        rest = {key: value for key, value in event.items() if key not in ("time", "at", "kind", "message")}
        said = [str(event["message"])] if event.get("message") else []
        said += [f"{key} {value}" for key, value in rest.items() if value not in (None, "", [], {})]
        rows.append([_clock(event.get("time", event.get("at"))), event.get("kind", ""), "; ".join(said)])
    kept = html.table(["time (UTC)", "event", "what"], rows)
    if len(run.events) <= 25:
        return kept
    cut = f", the last {MAX_EVENTS} of {len(run.events)}" if len(run.events) > MAX_EVENTS else ""
    return html.details(f"{len(rows)} events{cut}", kept)


def _clock(value: object) -> str:
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).strftime("%H:%M:%S")
    return str(value or "")


def origin(run: RunRecords) -> Html:
    """Return what the run was made from: base, spec, versions."""
    rows: list[tuple[object, object]] = [("run folder", run.folder)]
    if run.plan is not None:
        base = run.plan.base
        size = f"{format_count(run.plan.num_parameters)} parameters"
        rows += [
            (
                "base model",
                f"{base.shown} ({base.model_type}, {size}, {_quantized(base.quantize)})",
            ),
            ("revision", base.revision or MISSING),
            ("spec hash", run.plan.spec_sha256),
            ("data", f"{run.plan.data.train_documents:,} training documents, {run.plan.data.train_tokens:,} tokens"),
        ]
    versions = run.transfer.versions if run.transfer else {}
    parts = [html.facts(rows)]
    if versions:
        parts.append(html.table(["package", "version"], sorted(versions.items())))
    if run.spec_text:
        parts.append(html.details("The spec", html.tag("pre", run.spec_text)))
    return html.join(parts)
