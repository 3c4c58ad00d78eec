"""Whole screens of text: the plan before a run, the result after it."""

from __future__ import annotations

import textwrap

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.plan.values import ExecutionPlan, MemoryEstimate, RunPlan, TrialOption
from orchestrator.report.wording import (
    best_trial,
    measured_of,
    metric_text,
    number,
    plural,
    reads_sentence,
    score_text,
    signed,
    summary_sentence,
    verdict_sentence,
)
from orchestrator.transfer.records import PromptComparison, SweepResult, TransferReport, TrialRecord
from orchestrator.units import format_bytes, format_count

WIDTH = 100
INDENT = 10
ANSWER_CHARACTERS = 160


def final_screen(sweep: SweepResult, transfer: TransferReport) -> str:
    """What was found, in at most 100 columns: best, verdict, one prompt, bundle, report, next."""
    best = sweep.winner or best_trial(sweep.searched, sweep.higher_is_better)
    lines = [*_best(sweep, best, transfer), *_entry("verdict", verdict_sentence(sweep, transfer))]
    if sweep.ended_by_hours:
        lines += _entry("ended", sweep.ended_by_hours)
    if answered := _answered(transfer):
        lines += _entry("answers", answered)
    if again := reads_sentence(transfer.test_set_reads):
        lines += _entry("note", again)
    if transfer.prompts:
        lines += ["", *_answers(transfer.prompts[0]), ""]
    if transfer.bundle:
        lines += _entry("bundle", f"{transfer.bundle}    {_verified(transfer)}".rstrip())
    if transfer.report:
        lines += _entry("report", f"{transfer.report}    {summary_sentence(sweep)}")
    else:
        lines += _entry("search", summary_sentence(sweep))
    following = [*(sweep.advice[:1] if sweep.ended_by_hours else ()), *transfer.serve_commands[:1]]
    following = following if transfer.bundle else list(sweep.advice[:3])
    for index, step in enumerate(following):
        lines += _entry("next" if index == 0 else "", step)
    return "\n".join(lines)


def _entry(name: str, written: str) -> list[str]:
    """`name` in its own column, the text wrapped beside it. A path is never broken."""
    wrapped = textwrap.wrap(
        " ".join(written.split("\n")), WIDTH - INDENT, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return [f"{name if index == 0 else '':<{INDENT}}{line}" for index, line in enumerate(wrapped or [""])]


def _best(sweep: SweepResult, best: TrialRecord | None, transfer: TransferReport) -> list[str]:
    if best is None:
        return _entry("best", "no trial has a figure")
    base, head, found = sweep.control("none"), sweep.control("head"), measured_of(best, transfer)
    said = [f"{sweep.metric} {metric_text(found.metric, sweep.metric)}"]
    said += [f"{name} {metric_text(trial.metric, sweep.metric)}" for name, trial in (("base", base), ("head", head)) if trial]
    if found.retain_loss is not None:
        before = f"base {number(base.retain_loss)}, " if base and base.retain_loss is not None else ""
        said.append(f"retention {number(found.retain_loss)} ({before}{signed(found.forgetting)}, bound {sweep.max_forgetting:g})")
    name = "best" if sweep.winner is not None or sweep.finished_at is None else "best*"
    lines = [*_entry(name, best.label), *_entry("", "   ".join(said))]
    return lines if name == "best" else [*lines, *_entry("", "* of the trials; it was not promoted")]


def _answered(transfer: TransferReport) -> str:
    """`exact match 62.0% on 200 of 200 test documents, base 4.0%`."""
    scores = {score.model: score for score in transfer.scores if score.num_answered and "exact_match" in score.metrics}
    if "promoted" not in scores:
        return ""
    base = f", base {metric_text(scores['none'].metrics['exact_match'], 'exact_match')}" if "none" in scores else ""
    return f"exact match {score_text(scores['promoted'], 'exact_match')} test documents{base}"


def _verified(transfer: TransferReport) -> str:
    check = transfer.verification
    if check is None:
        return "not verified"
    if check.passed:
        return f"verified: KL {check.kl_bundle:.1e} a token against the trained model"
    return f"VERIFICATION FAILED: KL {check.kl_bundle:.1e} a token against the trained model, at most {check.limit:.1e} allowed"


def _answers(pair: PromptComparison) -> list[str]:
    said = [("prompt", pair.prompt), ("base", pair.base_answer), ("tuned", pair.tuned_answer)]
    said += [("expected", pair.expected)] if pair.expected else []
    return [line for name, written in said for line in _entry(name, _shorten(written))]


def _shorten(written: str) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in written).split())
    return flat if len(flat) <= ANSWER_CHARACTERS else flat[: ANSWER_CHARACTERS - 1] + "…"


def plan_view(plan: RunPlan) -> RenderableType:
    """The plan for people: what learns, memory term by term, how it is run, what was rejected, what it costs."""
    base = plan.base
    estimated = "" if plan.data.exact else " (estimated from file sizes)"
    title = Text(f"{plan.name}: {base.model_type}, {format_count(plan.num_parameters)} parameters, {base.quantize}", style="bold")
    data = Text(
        f"{plan.data.train_documents:,} documents, {plan.data.train_tokens:,} tokens an epoch{estimated}; "
        f"{plan.total_steps:,} steps in all"
    )
    options = plan.search.options if plan.search else (plan.finetune,) if plan.finetune else ()
    parts: list[RenderableType] = [title, data, Text(), _options_table(options), Text()]
    if options:
        largest = max(options, key=lambda option: option.memory.total_bytes)
        parts += [_memory_table(f"Memory of one rank, largest choice ({_option_name(largest)})", largest.memory), Text()]
    parts += [_execution_table(plan), Text()]
    if plan.rejected:
        parts += [_grid("Cheaper ways, rejected", [(way.way, way.reason) for way in plan.rejected]), Text()]
    said = [("warning", plan.warnings), ("because", plan.reasons), ("note", plan.notes)]
    parts += [_grid("", [(name, line) for name, lines in said for line in lines])]
    return Group(*parts)


def _option_name(option: TrialOption) -> str:
    return f"{option.layers}, lora r{option.lora_rank}" if option.tune == "lora" else f"{option.layers}, full"


def _options_table(options: tuple[TrialOption, ...]) -> Table:
    table = Table(title="What is tried", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("layers", max_width=28)
    table.add_column("tune")
    table.add_column("learning rate")
    for name in ("learns", "first block", "memory a rank"):
        table.add_column(name, justify="right")
    for option in options:
        tune = f"lora r{option.lora_rank}" if option.tune == "lora" else "full"
        low, high = option.learning_rate_low, option.learning_rate_high
        rates = f"{low:.1e}" if low == high else f"{low:.1e} to {high:.1e}"
        learns = format_count(option.selection.num_trainable_parameters)
        memory = format_bytes(option.memory.total_bytes)
        table.add_row(Text(option.layers), tune, rates, learns, str(option.selection.cut), memory)
    return table


def _memory_table(title: str, memory: MemoryEstimate) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, width=WIDTH)
    table.add_column("term", max_width=30)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("derived from", ratio=1)
    for term in memory.terms:
        table.add_row(Text(term.name), format_bytes(term.num_bytes), Text(term.reason))
    table.add_row("in all", format_bytes(memory.total_bytes), "", style="bold")
    return table


def _execution_table(plan: RunPlan) -> Table:
    rows = [("gangs", f"{plan.num_gangs} of {plural(plan.execution.ranks, 'rank')} each")]
    rows.append(("a trial runs by", _execution(plan.execution)))
    rows.append(("the refit runs by", _execution(plan.refit_execution)))
    if plan.search is not None:
        search = plan.search
        rungs = ", ".join(map(str, search.rung_steps))
        rows.append(
            ("search", f"{search.num_trials} trials by {search.algorithm}, {search.scheduler}; compared at steps {rungs}")
        )
    rows.append(("disk", format_bytes(plan.disk_bytes)))
    rows.append(
        ("GPU-hours", number(plan.gpu_hours, 2) if plan.gpu_hours is not None else "none: no GPU is used or its speed is unknown")
    )
    return _grid("How it is run", rows)


def _execution(execution: ExecutionPlan) -> str:
    said = [execution.executor, execution.device, execution.dtype]
    if execution.executor == "deepspeed":
        said.append(f"ZeRO {execution.zero_stage}, offload {execution.offload}")
    said.append(f"micro-batch {execution.micro_batch_rows} x {execution.row_tokens} tokens")
    said.append(f"{plural(execution.ranks, 'rank')} x {plural(execution.threads_per_rank, 'thread')}")
    if execution.checkpointing:
        said.append("gradient checkpointing")
    return ", ".join(said)


def _grid(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False, width=WIDTH
    )
    table.add_column(max_width=30, no_wrap=False)
    table.add_column(ratio=1)
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    return table
