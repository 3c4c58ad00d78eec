"""Figures as text, the same in the report and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from orchestrator.spec.tasks import metric_facts
from orchestrator.transfer import OverSeeds, over_seeds
from orchestrator.transfer.headline import headline
from orchestrator.transfer.records import (
    CONTROL_NAMES,
    BundledFigures,
    ModelScores,
    PlanAgainstMeasured,
    SweepResult,
    TransferReport,
    TrialRecord,
)
from orchestrator.units import format_bytes, format_count, format_seconds

MISSING = "-"


def number(value: float | None, digits: int = 3) -> str:
    """Return `1.830` for `1.8304`; NaN as text; a dash for None."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    return f"{value:.{digits}f}" if value == 0 or 0.001 <= abs(value) < 1e5 else f"{value:.2e}"


def signed(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return number(value, digits)
    return f"{value:+.{digits}f}"


def metric_text(value: float | None, metric: str) -> str:
    """Return shares as per cent, losses with three digits."""
    if value is not None and math.isfinite(value) and metric_facts(metric).is_share:
        return f"{100 * value:.1f}%"
    return number(value)


def model_name(model: str) -> str:
    """Return `head only` for `head`, `seed no. 2` for `repeat-2`."""
    kind, _, count = model.partition("-")
    if kind == "repeat" and count:
        return f"seed no. {count}"
    name = CONTROL_NAMES.get(kind, model)
    return f"{name} ({count})" if count and kind in CONTROL_NAMES else name


def metric_over_seeds(sweep: SweepResult, trial: TrialRecord, transfer: TransferReport | None) -> OverSeeds | None:
    """Return the eval metric of a trial, or of its bundle, and of its repeats from other seeds; None with one seed."""
    own = measured_of(trial, transfer).metric
    repeats = [other for other in sweep.trials if other.control == "repeat" and other.trial_id.endswith(f"-{trial.trial_id}")]
    if transfer is not None and transfer.scores:  # those shown next to the bundle: the others were trained differently
        beside = {f"{score.model}-{trial.trial_id}" for score in transfer.scores}
        repeats = [other for other in repeats if other.trial_id in beside]
    repeats = [other for other in repeats if other.state != "failed"]
    pairs = [(trial.seed, own), *((other.seed, other.metric) for other in repeats)]
    known = [(seed, metric) for seed, metric in pairs if metric is not None]
    return over_seeds([seed for seed, _ in known], [metric for _, metric in known])


def interval_text(found: OverSeeds, metric: str) -> str:
    """Return `1.830 ± 0.042`; shares as per cent."""
    half = f"{100 * found.half_width:.1f}" if metric_facts(metric).is_share else number(found.half_width)
    return f"{metric_text(found.mean, metric)} ± {half}"


def score_text(scores: ModelScores, metric: str) -> str:
    """Return the metric; `41.2% on 200 of 500` if it may cover fewer documents than the losses."""
    value = metric_text(scores.metrics.get(metric), metric)
    if not metric_facts(metric).generated or metric not in scores.metrics or not scores.num_answered:
        return value
    return f"{value} on {scores.num_answered} of {scores.num_documents}"


def reads_sentence(reads: int) -> str:
    """Return a warning if the test set was read more than once; otherwise empty."""
    if reads < 2:
        return ""
    return f"the test set has been read {reads} times for this run: do not base choices on it; use new rows for a new verdict"


def amount(value: float | None, unit: str) -> str:
    """Return a figure of `PlanAgainstMeasured` with its unit."""
    if value is None or not math.isfinite(value):
        return number(value)
    written = {"bytes": format_bytes, "seconds": format_seconds, "count": format_count}
    return written[unit](value) if unit in written else f"{format_count(round(value))} {unit}"


def ratio(row: PlanAgainstMeasured) -> str:
    if not row.planned or row.measured is None:
        return MISSING
    return f"{row.measured / row.planned:.2f}x"


def sort_trials(trials: Iterable[TrialRecord], higher_is_better: bool) -> list[TrialRecord]:
    """Sort by score, best first; then trials without a score; failed ones last."""

    def key(trial: TrialRecord) -> tuple[int, float]:
        value = trial.score
        if value is None and trial.metric is not None:
            # Before its first score a trial is ranked only by its metric.
            value = 1.0 - trial.metric if higher_is_better else trial.metric
        ranked = value is not None and math.isfinite(value)
        return (2 if trial.state == "failed" else 0 if ranked else 1, value if ranked and value is not None else trial.number)

    return sorted(trials, key=key)


def best_trial(trials: Sequence[TrialRecord], higher_is_better: bool) -> TrialRecord | None:
    """Return the best trial so far; None if none has a figure."""
    measured = [trial for trial in trials if trial.state != "failed" and trial.metric is not None and math.isfinite(trial.metric)]
    return sort_trials(measured, higher_is_better)[0] if measured else None


def measured_of(trial: TrialRecord, transfer: TransferReport | None) -> TrialRecord | BundledFigures:
    """Return the trial's figures: those of its bundle or, without one, of its last rung."""
    if transfer is not None and transfer.bundled is not None and transfer.trial_id == trial.trial_id:
        return transfer.bundled
    return trial


def counts(trials: Sequence[TrialRecord]) -> dict[str, int]:
    """Return the number of trials in each state."""
    return {state: sum(trial.state == state for trial in trials) for state in ("running", "finished", "stopped", "failed")}


def engine_text(executor: str, zero_stage: int, ranks: int) -> str:
    """Return `deepspeed, ZeRO 2, 2 ranks`."""
    stage = f", ZeRO {zero_stage}" if executor == "deepspeed" else ""
    return f"{executor}{stage}, {plural(ranks, 'rank')}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def summary_sentence(sweep: SweepResult) -> str:
    """Return `16 trials in 1m14s on 2 worker groups, 9 stopped early, 1 failed`."""
    by_state = counts(sweep.searched)
    took = f" in {format_seconds(sweep.wall_seconds)}" if sweep.wall_seconds else ""
    said = [f"{plural(len(sweep.searched), 'trial')}{took} on {plural(sweep.num_gangs, 'worker group')}"]
    if by_state["stopped"]:
        said.append(f"{by_state['stopped']} stopped early")
    if by_state["failed"]:
        said.append(f"{by_state['failed']} failed")
    return ", ".join(said)


def verdict_sentence(sweep: SweepResult | None, transfer: TransferReport | None) -> str:
    """Return the verdict, or why there is none."""
    if transfer is not None and transfer.sentence:
        return headline(transfer)
    if sweep is None:
        return "The run has not measured anything yet."
    if sweep.finished_at is None:
        return "The run has not ended; this is its state so far."
    return f"Nothing was promoted: {sweep.promotion_reason}" if sweep.winner_id is None else sweep.promotion_reason
