"""First sections of the report: the verdict, the search, its trade-off, and what to do next."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from orchestrator.plan.data_size import too_few_steps_warning
from orchestrator.plan.values import SweepPlan
from orchestrator.report import figures, html, run_details
from orchestrator.report.figures import Curve, TradeOff
from orchestrator.report.heatmap import heatmap
from orchestrator.report.html import Html
from orchestrator.report.live_page import in_progress
from orchestrator.report.matrix import RateMatrix, rate_matrices
from orchestrator.report.trial_table import evaluated_early
from orchestrator.report.wording import (
    MISSING,
    best_trial,
    interval_text,
    measured_of,
    metric_over_seeds,
    metric_text,
    number,
    signed,
    sort_trials,
    summary_sentence,
    verdict_sentence,
)
from orchestrator.run.reader import RunRecords
from orchestrator.spec.tasks import head_of
from orchestrator.transfer import pareto_front
from orchestrator.transfer.headline import gain_is_loss_only
from orchestrator.transfer.promotion import PROMOTABLE_CONTROLS
from orchestrator.transfer.records import CONTROL_NAMES, SweepResult, TransferReport, TrialRecord
from orchestrator.transfer.verdict_advice import advice_after
from orchestrator.units import format_count, format_seconds

SMOOTHING = 0.15
"""Weight of the newest step in the smoothed training loss."""


def head(run: RunRecords) -> Html:
    """Return title, verdict and the main figures."""
    parts = [html.tag("h1", run.name), html.tag("p", _under_title(run), css="under")]
    kind = run.transfer.verdict if run.transfer else None
    proud = kind == "positive" and run.transfer is not None and not gain_is_loss_only(run.transfer)
    tone = "good" if proud else "bad" if kind == "negative" else ""
    parts.append(html.tag("p", _capital(verdict_sentence(run.sweep, run.transfer)), css=f"headline {tone}".strip()))
    if run.sweep is not None:
        parts.append(_cards(run, run.sweep))
    if run.sweep is not None and run.sweep.ended_by_hours:
        parts.append(html.tag("p", _capital(run.sweep.ended_by_hours) + ".", css="warning"))
    promoted = (run.sweep.winner or best_trial(run.sweep.searched, run.sweep.higher_is_better)) if run.sweep else None
    if few := too_few_steps_warning(promoted.total_steps) if promoted is not None and promoted.total_steps else "":
        parts.append(html.tag("p", _capital(few) + ".", css="warning"))
    parts.append(run_details.data_notices(run))
    if not run.complete:
        parts.append(in_progress(run))
    if run.gaps:
        parts.append(html.tag("div", html.tag("strong", "Could not be read:"), html.bullets(run.gaps), css="warning"))
    return html.join(parts)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _under_title(run: RunRecords) -> str:
    sweep = run.sweep
    if sweep is None:
        return "no trial yet"
    said = [f"{sweep.job} · {sweep.task}", summary_sentence(sweep)]
    if sweep.started_at:
        said.append(datetime.fromtimestamp(sweep.started_at, UTC).strftime("%Y-%m-%d %H:%M UTC"))
    return " · ".join(said)


def _cards(run: RunRecords, sweep: SweepResult) -> Html:
    promoted = sweep.winner or best_trial(sweep.searched, sweep.higher_is_better)
    found = measured_of(promoted, run.transfer) if promoted else None
    base, extraction = sweep.control("none"), sweep.control("head")
    whose = "of that trial" if found is promoted else "of its bundle"
    figure = metric_text(found.metric, sweep.metric) if found else MISSING
    by_seed = metric_over_seeds(sweep, promoted, run.transfer) if promoted else None
    if by_seed is not None:
        figure, whose = interval_text(by_seed, sweep.metric), f"over {len(by_seed.seeds)} seeds; {figure} {whose}"
    title = "promoted" if sweep.winner else "best trial" if sweep.finished_at else "best so far"
    cards = [
        (title, promoted.layers if promoted else MISSING, _point(promoted)),
        (f"{sweep.metric}, eval set", figure, whose),
        ("base model", metric_text(base.metric, sweep.metric) if base else MISSING, f"{sweep.metric}, eval set"),
        ("head only", metric_text(extraction.metric, sweep.metric) if extraction else MISSING, f"{sweep.metric}, eval set"),
        ("forgetting", signed(found.forgetting) if found else MISSING, _bound(sweep)),
    ]
    cards = [card for card in cards if card[1] != MISSING]
    return html.tag(
        "div",
        *(
            html.tag(
                "div",
                html.tag("div", name, css="name"),
                html.tag("div", value, css="value"),
                html.tag("div", note, css="note"),
                css="card",
            )
            for name, value, note in cards
        ),
        css="cards",
    )


def _bound(sweep: SweepResult) -> str:
    bound = f"bound {sweep.max_forgetting:g} " if math.isfinite(sweep.max_forgetting) else ""
    return f"{bound}nats per token"


def _point(trial: TrialRecord | None) -> str:
    if trial is None:
        return "no trial has a figure yet"
    return f"{trial.method} · lr {trial.learning_rate:.1e} · {format_count(trial.trainable_parameters)} parameters"


def search_map(run: RunRecords, sweep: SweepResult) -> Html:
    """Return the heatmap of layers by learning rate."""
    order = [option.layers for option in run.plan.options] if isinstance(run.plan, SweepPlan) else []
    budgets = rate_matrices(sweep.searched, sweep.higher_is_better, order)
    panels = [panel for each in budgets for panel in each]
    shown = figures.finite([value for panel in panels for row in panel.values for value in row])
    if not shown:
        return html.paragraph("No trial has been evaluated yet.")
    several = (
        "A row of panels holds the trials evaluated after the same number of steps, and has its own colour scale: compare "
        "colours within a row. Hatched cells were tried but ended earlier, or have not reached that step. "
    )
    caption = (
        f"The best {sweep.metric} on the eval set of each choice of layers at each learning rate, over all adapters. "
        f"{several if len(budgets) > 1 else ''}Empty cells were not tried."
    )
    data = html.join(
        html.join(
            (html.tag("h3", f"{figures.METHODS[panel.title]}, after {panel.step} steps"), _matrix_table(panel, sweep.metric))
        )
        for panel in panels
    )
    return html.picture(heatmap(budgets, sweep.metric, sweep.higher_is_better), caption, data)


def _matrix_table(panel: RateMatrix, metric: str) -> Html:
    rows = [
        [layers, *(_cell(*cell, metric) for cell in zip(values, amounts, tried, strict=True))]
        for layers, values, amounts, tried in zip(panel.rows, panel.values, panel.counts, panel.tried, strict=True)
    ]
    return html.table(["layers", *panel.ranges], rows, numeric=range(1, len(panel.columns) + 1))


def _cell(value: float | None, count: int, tried: int, metric: str) -> str:
    if value is None:
        return MISSING if not tried else "not evaluated here"
    return ("failed" if math.isnan(value) else metric_text(value, metric)) + (f" ({count})" if count > 1 else "")


def loss_curves(run: RunRecords, sweep: SweepResult) -> Html:
    """Return the metric at the rungs and the training loss, over training tokens."""
    best = sweep.winner or best_trial(sweep.searched, sweep.higher_is_better)
    at_rungs = [curve for trial in sweep.trials if (curve := _rung_curve(trial, sweep, trial is best)) is not None]
    training = [curve for trial in sweep.searched if (curve := _training_curve(run, trial, trial is best)) is not None]
    panels = [
        (f"{sweep.metric} on the eval set", sweep.metric, at_rungs),
        ("training loss, smoothed", head_of(sweep.task).training_unit, training),
    ]
    drawn = [panel for panel in panels if any(curve.emphasis not in ("base", "head") for curve in panel[2])]
    if not drawn:
        return html.paragraph("No trial has been evaluated yet.")
    answered = any(rung.retain_accuracy is not None for trial in sweep.trials for rung in trial.rungs)
    rows = [
        [
            trial.number,
            trial.label,
            rung.rung,
            rung.step,
            format_count(rung.tokens),
            number(rung.train_loss),
            number(rung.eval_loss),
            metric_text(rung.metric, sweep.metric),
            number(rung.retain_loss),
            *([metric_text(rung.retain_accuracy, "accuracy")] if answered else []),
            format_seconds(rung.seconds),
        ]
        for trial in sweep.trials
        for rung in trial.rungs
    ]
    headers = ["trial", "what", "rung", "step", "tokens", "train loss", "eval loss", sweep.metric, "retention loss"]
    headers += [*(["retention accuracy"] if answered else []), "time"]
    caption = (
        "Dots are rungs: the steps at which trials are evaluated, compared, and stopped where others are better. Diverged trials "
        "leave the frame. Where losses span a wide range, the axis is logarithmic."
    )
    return html.picture(figures.curves(drawn), caption, html.table(headers, rows, numeric=(0, *range(2, len(headers)))))


def _rung_curve(trial: TrialRecord, sweep: SweepResult, promoted: bool) -> Curve | None:
    points = [(rung.tokens, rung.metric) for rung in trial.rungs if rung.metric is not None and math.isfinite(rung.metric)]
    if not points or trial.control not in (None, "none", "head"):
        return None
    emphasis = {"none": "base", "head": "head"}.get(trial.control or "", "promoted" if promoted else "")
    label = CONTROL_NAMES.get(trial.control or "", trial.label)
    return Curve(label, tuple(float(x) for x, _ in points), tuple(y for _, y in points), emphasis, marked=True)


def _training_curve(run: RunRecords, trial: TrialRecord, promoted: bool) -> Curve | None:
    steps = [step for step in run.steps_of(trial) if math.isfinite(step.loss)]
    if not steps:
        return None
    smooth, values = steps[0].loss, []
    for step in steps:
        smooth += SMOOTHING * (step.loss - smooth)
        values.append(smooth)
    return Curve(trial.label, tuple(float(step.tokens) for step in steps), tuple(values), "promoted" if promoted else "")


def trade_off(sweep: SweepResult) -> Html:
    """Return the chart of target and retention."""
    drawn = (trial for trial in sweep.trials if trial.control in (*PROMOTABLE_CONTROLS, "none") and trial.state != "failed")
    measured = [
        trial
        for trial in drawn
        if None not in (trial.metric, trial.forgetting) and math.isfinite((trial.metric or 0.0) + (trial.forgetting or 0.0))
    ]
    promotable = [trial for trial in measured if trial.control in PROMOTABLE_CONTROLS]
    if not promotable:
        return html.paragraph("Retention was not measured: the spec names no `data.retain`, or no trial reached that point.")
    front = _front(promotable, sweep.higher_is_better)
    points = [
        TradeOff(
            CONTROL_NAMES.get(trial.control or "", trial.tune),
            trial.forgetting or 0.0,
            trial.metric or 0.0,
            trial.trial_id in front,
            trial.trial_id == sweep.winner_id,
            evaluated_early(trial),
        )
        for trial in measured
    ]
    svg = figures.front(points, sweep.max_forgetting, sweep.metric, sweep.higher_is_better)
    rows = [
        [
            trial.number,
            trial.label,
            trial.judged.step if trial.judged else MISSING,
            metric_text(trial.metric, sweep.metric),
            signed(trial.forgetting),
            "yes" if trial.trial_id in front else "",
            "yes" if (trial.forgetting or 0.0) <= sweep.max_forgetting else "no",
        ]
        for trial in sort_trials(measured, sweep.higher_is_better)
    ]
    headers = ["trial", "what", "evaluated at step", sweep.metric, "forgetting", "on the front", "within the bound"]
    data = html.table(headers, rows, numeric=(0, 2, 3, 4))
    bound = " The grey area is beyond the bound on forgetting." if math.isfinite(sweep.max_forgetting) else ""
    early = " Hollow trials were evaluated before their full budget." if any(point.early for point in points) else ""
    caption = (
        "No trial is better on the target and forgets less than one on the front (Pareto front); the base model, which is no "
        f"trial, is drawn beside them.{bound}{early}"
    )
    return html.join([html.paragraph(recommendation(sweep)), html.picture(svg, caption, data)])


def recommendation(sweep: SweepResult) -> str:
    """Return in one sentence what was promoted and why, or why nothing was."""
    reason = sweep.promotion_reason
    if sweep.promoted_by_hand:
        return f"{_capital(reason)}."
    return f"Promoted: {reason}." if sweep.winner_id is not None else f"Nothing was promoted: {reason}."


def _front(trials: list[TrialRecord], higher_is_better: bool) -> set[str]:
    """Return the ids on the Pareto front; both coordinates are converted so that lower is better."""
    sign = -1.0 if higher_is_better else 1.0
    points = [(sign * (trial.metric or 0.0), trial.forgetting or 0.0) for trial in trials]
    return {trials[index].trial_id for index in pareto_front(points)}


def next_steps(sweep: SweepResult, transfer: TransferReport | None) -> Html:
    advice = [*(advice_after(transfer, by_hand=sweep.promoted_by_hand) if transfer else ()), *sweep.advice]
    nothing = html.tag("p", "No recommendations.")
    return html.join([html.paragraph(recommendation(sweep)), html.bullets(advice, ordered=True) if advice else nothing])
