"""Planned and measured memory per rank for each choice of the search."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.transfer.records import EngineFigures, MemoryRow, TrialRecord


def memory_rows(trials: Sequence[TrialRecord]) -> tuple[MemoryRow, ...]:
    """Return a row for each choice whose trials measured memory or ran out of it, in the order of the trials.

    The head control counts with the choice `head`, and the shuffled control with the trial it repeats: they train the same.
    """
    by_choice: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.out_of_memory or (trial.engine is not None and trial.engine.rank_peak_memory_bytes):
            by_choice.setdefault(_label(trial), []).append(trial)
    return tuple(_row(label, chosen) for label, chosen in by_choice.items())


def _label(trial: TrialRecord) -> str:
    if trial.control == "none":
        return "base model"
    return f"{trial.layers} · {trial.method}"


def _row(label: str, trials: Sequence[TrialRecord]) -> MemoryRow:
    engines = [trial.engine for trial in trials if trial.engine is not None]
    num_ranks = max((len(engine.rank_peak_memory_bytes) for engine in engines), default=0)
    peaks = tuple(
        max(engine.rank_peak_memory_bytes[rank] for engine in engines if rank < len(engine.rank_peak_memory_bytes))
        for rank in range(num_ranks)
    )
    predicted = next((engine.predicted_memory_bytes for engine in engines if engine.predicted_memory_bytes), None)
    ran_out = [trial for trial in trials if trial.out_of_memory]
    return MemoryRow(
        label=label,
        num_trials=len(trials),
        device=engines[0].device if engines else "",
        predicted_bytes=predicted,
        measured_bytes=max(peaks, default=0),
        rank_peak_bytes=peaks,
        ratio=max(peaks) / predicted if predicted and peaks and not ran_out else None,
        micro_batch_rows=_fewest_rows(engines),
        checkpointing=any(engine.checkpointing for engine in engines),
        num_out_of_memory=len(ran_out),
        num_failed_for_memory=sum(trial.state == "failed" for trial in ran_out),
    )


def _fewest_rows(engines: Sequence[EngineFigures]) -> int:
    return min((engine.micro_batch_rows for engine in engines), default=0)
