"""The table of all trials, with the reason for each one's rank."""

from __future__ import annotations

import math

from orchestrator.report import html
from orchestrator.report.html import Html
from orchestrator.report.wording import MISSING, counts, metric_text, number, plural, signed, sort_trials
from orchestrator.run.reader import RunRecords
from orchestrator.transfer.records import CONTROL_NAMES, SweepResult, TrialRecord
from orchestrator.units import format_count, format_seconds


def trial_table(run: RunRecords, sweep: SweepResult) -> Html:
    """Return all trials, best first, failed ones with their reason."""
    controls = [trial for trial in sweep.trials if trial.control is not None]
    ordered = [*controls, *sort_trials(sweep.searched, sweep.higher_is_better)]
    promoted = [index for index, trial in enumerate(ordered) if trial.trial_id == sweep.winner_id]
    losses = [] if sweep.metric == "loss" else ["eval loss"]
    headers = ["trial", "layers", "method", "learning rate", "trainable", "state", "evaluated at step"]
    headers += [sweep.metric, *losses, "forgetting", "time", "why it ranks here"]
    by_state = ", ".join(f"{amount} {state}" for state, amount in counts(sweep.searched).items() if amount)
    rows = [_row(run, trial, sweep) for trial in ordered]
    said = (
        f"{plural(len(sweep.searched), 'trial')} ({by_state or 'none yet'}), best first by {_ranked_by(sweep)}; controls are on "
        "top. The method full is full fine-tuning of the chosen layers, lora trains LoRA adapters in them; trainable is how many "
        "parameters are trained."
    )
    numeric = (0, 3, 4, *range(6, len(headers) - 1))
    return html.join([html.paragraph(said), html.table(headers, rows, numeric=numeric, marked=promoted)])


def _ranked_by(sweep: SweepResult) -> str:
    if not math.isfinite(sweep.max_forgetting):
        return sweep.metric
    return f"{sweep.metric} with a penalty for forgetting beyond the bound of {sweep.max_forgetting:g} nats per token"


def _row(run: RunRecords, trial: TrialRecord, sweep: SweepResult) -> list[object]:
    untouched = trial.control == "none"
    state = run.state_of(trial)
    row: list[object] = [
        "" if trial.control else trial.number,
        CONTROL_NAMES[trial.control] if trial.control else trial.layers,
        MISSING if untouched else html.tag("span", trial.method, css="state"),
        MISSING if untouched else f"{trial.learning_rate:.1e}",
        format_count(trial.trainable_parameters),
        html.tag("span", state, css=f"state {trial.state}"),
        steps_text(trial, run.step_of(trial)),
        metric_text(trial.metric, sweep.metric),
    ]
    if sweep.metric != "loss":
        row.append(number(trial.judged.eval_loss) if trial.judged else MISSING)
    time = format_seconds(trial.seconds) if trial.seconds else MISSING
    return [*row, signed(trial.forgetting), time, rank_reason(trial, sweep)]


def steps_text(trial: TrialRecord, reached: int) -> str:
    """Return `37 of 327`; `37 of 327, now at 80` during training; `0 of 327, now at 30` before the first evaluation.

    Args:
        reached: Last recorded step.

    """
    judged, last = trial.judged, trial.last
    if trial.total_steps == 0 or trial.control == "none":
        return MISSING
    said = f"{judged.step if judged else 0} of {trial.total_steps}"
    return f"{said}, now at {reached}" if reached > (last.step if last else 0) and trial.state == "running" else said


def evaluated_early(trial: TrialRecord) -> bool:
    """Return True if the trial is compared by figures from before its full budget."""
    return trial.control != "none" and trial.judged is not None and trial.judged.step < trial.total_steps


def rank_reason(trial: TrialRecord, sweep: SweepResult) -> str:
    """Return why a trial has its rank, especially if a trial with a worse figure ranks higher."""
    said: list[str] = []
    judged, last = trial.judged, trial.last
    if trial.trial_id == sweep.winner_id:
        said.append("promoted by hand" if sweep.promoted_by_hand else "promoted")
    if trial.state == "failed":
        return "; ".join([*said, f"failed: {trial.reason}" if trial.reason else "failed"])
    if (trial.forgetting or 0.0) > sweep.max_forgetting:
        said.append(f"forgets more than the bound of {sweep.max_forgetting:g}{_penalised(trial, sweep)}")
    elif trial.control is None and _better_than_winner(trial, sweep):
        said.append("scored better than the promoted trial, but not shown to be better than the base model")
    if judged is not None and last is not None and judged is not last:
        said.append(f"compared by step {judged.step}, its best; it was trained to step {last.step}")
    if trial.state == "stopped":
        others = "" if last is None else f"stopped at step {last.step}: others were better at that step"
        said.append(trial.reason or others)
    elif trial.reason:
        said.append(trial.reason)
    return "; ".join(part for part in said if part)


def _penalised(trial: TrialRecord, sweep: SweepResult) -> str:
    if trial.score is None or not math.isfinite(trial.score):
        return ""
    # The score of a metric that is better when higher is 1 - value plus the penalty (`transfer.scoring`).
    ranked = 1.0 - trial.score if sweep.higher_is_better else trial.score
    return f": ranked as {sweep.metric} {metric_text(ranked, sweep.metric)}"


def _better_than_winner(trial: TrialRecord, sweep: SweepResult) -> bool:
    winner = sweep.winner
    if winner is None or sweep.promoted_by_hand or trial is winner or trial.score is None or winner.score is None:
        return False
    return trial.score < winner.score
