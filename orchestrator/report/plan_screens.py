"""The plan as a terminal screen of at most 100 columns: the decisions, and on request every derivation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.plan.estimates import CostEstimate, CostItem, MemoryEstimate, Placement
from orchestrator.plan.values import RunPlan, SweepPlan, TrialOption
from orchestrator.report.wording import number, plural
from orchestrator.units import format_bytes, format_count, format_flops, format_seconds
from orchestrator.work.execution import ExecutionPlan

WIDTH = 100
UNKNOWN = "unknown: the GPU's peak rate is not in the table"


def plan_view(plan: RunPlan, *, explain: bool = False) -> RenderableType:
    """Return the plan's screen: choices, memory by term, execution, cost, rejected alternatives.

    Args:
        explain: With the derivations: memory of every choice, operations of a token, cost, disk, placement.
    """
    base, options = plan.base, plan.options
    hub = f"{base.shown}, " if base.hub_id else ""
    estimated = "" if plan.data.exact else " (estimated from file sizes)"
    parts: list[RenderableType] = [
        Text(
            f"{plan.name}: {hub}{base.model_type}, {format_count(plan.num_parameters)} parameters, {_quantized(base.quantize)}",
            style="bold",
        ),
        Text(
            f"{plan.data.train_documents:,} documents, {plan.data.train_tokens:,} tokens per epoch{estimated}; "
            f"{plan.total_steps:,} steps in all{_of_tokens(plan)}"
        ),
        Text(),
        _options_table(plan, options),
        Text(),
    ]
    if explain:
        parts += [part for option in options for part in _option_derivation(plan, option)]
    elif options:
        largest = max(options, key=lambda option: option.memory.total_bytes)
        parts += [_memory_table(f"Memory of one rank, largest choice ({_option_name(largest)})", largest.memory), Text()]
    parts += [_execution_table(plan), Text(), _grid("Time and disk", _costs(plan)), Text()]
    if explain:
        parts += _derivations(plan)
    if plan.rejected:
        parts += [_grid("Cheaper options, rejected", [(way.way, way.reason) for way in plan.rejected]), Text()]
    said = [("warning", plan.warnings), ("because", plan.reasons), ("note", plan.notes)]
    return Group(*parts, _grid("", [(name, line) for name, lines in said for line in lines]))


def _of_tokens(plan: RunPlan) -> str:
    """Return ` of up to 256 tokens`; empty in plans of older versions."""
    return f" of up to {plan.data.tokens_per_step:,} tokens" if plan.data.tokens_per_step else ""


def _quantized(quantize: str) -> str:
    return "not quantized" if quantize == "none" else f"quantized to {quantize}"


def _option_name(option: TrialOption) -> str:
    return f"{option.layers}, {option.method}"


def _options_table(plan: RunPlan, options: Sequence[TrialOption]) -> Table:
    table = Table(title="Choices", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("layers", max_width=24)
    table.add_column("tune", no_wrap=True)
    table.add_column("learning rate", no_wrap=True)
    for name in ("trainable", "first\ntrained\nblock", "memory", "FLOPs/\ntoken", "time/\ntrial"):
        table.add_column(name, justify="right", no_wrap=True)
    costs = plan.cost.options if plan.cost is not None else ()
    for index, option in enumerate(options):
        low, high = option.learning_rate_low, option.learning_rate_high
        rates = f"{low:.1e}" if low == high else f"{low:.1e} to {high:.1e}"
        learns = format_count(option.selection.num_trainable_parameters)
        memory = format_bytes(option.memory.total_bytes)
        cost = costs[index] if index < len(costs) else None
        flops = format_flops(cost.flops_per_token) if cost else ""
        seconds = format_seconds(cost.trial_seconds) if cost and cost.trial_seconds is not None else ""
        table.add_row(Text(option.layers), Text(option.method), rates, learns, str(option.selection.cut), memory, flops, seconds)
    return table


def _memory_table(title: str, memory: MemoryEstimate) -> Table:
    rows = [(term.name, format_bytes(term.num_bytes), term.reason) for term in memory.terms]
    return _terms_table(title, "derived from", rows, format_bytes(memory.total_bytes))


def _terms_table(title: str, reason: str, rows: Iterable[tuple[str, str, str]], total: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, width=WIDTH)
    table.add_column("term", max_width=30)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column(reason, ratio=1)
    for name, size, why in rows:
        table.add_row(Text(name), size, Text(why))
    table.add_row("in all", total, "", style="bold")
    return table


def _execution_table(plan: RunPlan) -> Table:
    rows = [("worker groups (gangs)", f"{plan.num_gangs} of {plural(plan.execution.ranks, 'rank')} each")]
    if plan.placement is not None:
        rows += [("placement" if index == 0 else "", line) for index, line in enumerate(plan.placement.sentences)]
    rows.append(("trials run on", _execution(plan.execution)))
    rows.append(("the refit runs on", _execution(plan.refit_execution)))
    if isinstance(plan, SweepPlan):
        search = plan.search
        rungs = ", ".join(map(str, search.rung_steps))
        rows.append(
            ("search", f"{search.num_trials} trials by {search.algorithm}, {search.scheduler}; compared at steps {rungs}")
        )
    return _grid("Execution", rows)


def _execution(execution: ExecutionPlan) -> str:
    said = [execution.executor, execution.device, execution.dtype]
    if execution.executor == "deepspeed":
        said.append(f"ZeRO {execution.zero_stage}, offload {execution.offload}")
    said.append(f"micro-batch {execution.micro_batch_rows} x {execution.row_tokens} tokens")
    said.append(f"{plural(execution.ranks, 'rank')} x {plural(execution.threads_per_rank, 'thread')}")
    if execution.checkpointing:
        said.append("gradient checkpointing")
    return ", ".join(said)


def _costs(plan: RunPlan) -> list[tuple[str, str]]:
    """Return hours before and after early stopping, money, disk."""
    cost = plan.cost
    if cost is None:
        hours = number(plan.gpu_hours, 2) if plan.gpu_hours is not None else UNKNOWN
        return [("GPU-hours", hours), ("disk", format_bytes(plan.disk_bytes))]
    rows: list[tuple[str, str]] = []
    if cost.duration is not None:
        rows.append(("time", f"{cost.duration}; the run's first steps narrow it"))
    if cost.core_hours is not None:
        rows.append(("core-hours", f"{_hours(cost.core_hours)} of arithmetic"))
    else:
        rows.append(("GPU-hours", _gpu_hours(plan, cost)))
    if cost.wall_hours is not None:
        rows.append(("arithmetic", f"{format_seconds(3600 * cost.wall_hours)} with every worker group busy at the assumed rate"))
    if cost.price is not None and cost.price_without_stopping is not None:
        whole = f"; {cost.price_without_stopping:,.2f} without early stopping" if _stops(plan) else ""
        rows.append(("price", f"{cost.price:,.2f} at {cost.price_per_gpu_hour:g} per GPU-hour{whole}"))
    disk = f"{format_bytes(cost.disk_bytes)}, including the bundle at {format_bytes(cost.bundle_bytes)}"
    rows.append(("disk", f"{disk}; a checkpoint of the largest choice {format_bytes(cost.checkpoint_bytes)}"))
    return rows


def _gpu_hours(plan: RunPlan, cost: CostEstimate) -> str:
    if cost.gpu_hours is None or cost.gpu_hours_without_stopping is None:
        return UNKNOWN
    said = f"{_hours(cost.gpu_hours)}"
    if _stops(plan):
        said += f" with early stopping, {_hours(cost.gpu_hours_without_stopping)} without"
    return f"{said}; of it the refit {_hours(cost.gpu_hours_refit)}" if cost.gpu_hours_refit else said


def _stops(plan: RunPlan) -> bool:
    return isinstance(plan, SweepPlan) and len(plan.search.rung_steps) > 1


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _option_derivation(plan: RunPlan, option: TrialOption) -> list[RenderableType]:
    """Return memory of a rank and operations per token, for one choice."""
    name = _option_name(option)
    parts: list[RenderableType] = [_memory_table(f"Memory of one rank: {name}", option.memory), Text()]
    if option.memory.phases:
        rows = [(phase.name, format_bytes(phase.num_bytes)) for phase in option.memory.phases]
        parts += [_grid("By phase of a step, without slack and runtime: the first is the one above", rows), Text()]
    if option.host_memory.terms:
        parts += [_memory_table(f"Host memory of one rank: {name}", option.host_memory), Text()]
    key = (option.layers, option.method)
    cost = next((c for c in plan.cost.options if (c.layers, c.method) == key), None) if plan.cost else None
    if cost is not None:
        rows = [(term.name, format_flops(term.flops), term.reason) for term in cost.terms]
        total = format_flops(cost.flops_per_token)
        parts += [_terms_table(f"Operations of one token: {_option_name(option)}", "counted as", rows, total), Text()]
    return parts


def _derivations(plan: RunPlan) -> list[RenderableType]:
    """Return the derivations for the whole run: operations, rate, disk, placement."""
    parts: list[RenderableType] = []
    cost = plan.cost
    if cost is not None:
        total = format_flops(sum(part.amount for part in cost.operations))
        parts += [_terms_table("Operations of the run", "derived from", _rows(cost.operations, format_flops), total), Text()]
        parts += [_grid("From operations to hours", _rate(plan, cost)), Text()]
        disk = _rows(cost.disk, format_bytes)
        parts += [_terms_table("Disk", "derived from", disk, format_bytes(cost.disk_bytes)), Text()]
    for title, placed in (("Placement of the gangs", plan.placement), ("Placement of the refit", plan.refit_placement)):
        if placed is not None:
            parts += [_placement_table(title, placed), Text()]
    return parts


def _rows(parts: Iterable[CostItem], say: Callable[[float], str]) -> list[tuple[str, str, str]]:
    return [(part.name, say(part.amount), part.reason) for part in parts]


def _rate(plan: RunPlan, cost: CostEstimate) -> list[tuple[str, str]]:
    rate, unit = cost.rate, "core" if cost.core_hours is not None else "GPU"
    if rate.peak_flops is None or rate.flops is None:
        return [("rate", f"unknown: {rate.device} is not in the table")]
    share = "" if unit == "core" else f" x {rate.achieved_share:.0%} of it reached"
    rows = [(f"one {unit}", f"{rate.device}: {rate.peak_flops / 1e12:g} TFLOP/s{share}"), ("source", rate.source)]
    hours = cost.core_hours if cost.core_hours is not None else cost.gpu_hours
    total = sum(part.amount for part in cost.operations)
    if hours is not None:
        rows.append((f"{unit}-hours", f"{format_flops(total)} / {format_flops(rate.flops)}/s / 3600 = {_hours(hours)}"))
    if _stops(plan):
        stopped = f"{format_flops(cost.operations_without_stopping)} with every trial trained to its end"
        rows.append(("without early stopping", stopped))
    return rows


def _placement_table(title: str, placed: Placement) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("nodes", max_width=40)
    for name in ("number", "gangs inside", "ranks of spanning gangs", f"{placed.unit}s left over"):
        table.add_column(name, justify="right")
    for kind in placed.nodes:
        counts = (kind.count, kind.gangs_inside, kind.ranks_spanning, kind.left_over)
        table.add_row(Text(kind.node), *map(str, counts))
    return table


def _grid(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False, width=WIDTH
    )
    table.add_column(max_width=30, no_wrap=False)
    table.add_column(ratio=1)
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    return table
