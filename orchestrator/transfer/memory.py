"""Memory of a rank as planned beside as measured, for every choice of the search."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.transfer.measured import MemoryRow
from orchestrator.transfer.records import EngineFigures, TrialRecord


def memory_rows(trials: Sequence[TrialRecord]) -> tuple[MemoryRow, ...]:
    """A row for every choice whose trials measured something, in the order of the trials.

    The head control stands with the choice `head`, and the shuffled control with what it repeats: they train the same.
    """
    by_choice: dict[str, list[EngineFigures]] = {}
    for trial in trials:
        if trial.engine is not None and trial.engine.rank_peak_memory_bytes:
            by_choice.setdefault(_label(trial), []).append(trial.engine)
    return tuple(_row(label, engines) for label, engines in by_choice.items())


def _label(trial: TrialRecord) -> str:
    if trial.control == "none":
        return "untouched base"
    return f"{trial.layers} · lora r{trial.lora_rank}" if trial.tune == "lora" else f"{trial.layers} · full"


def _row(label: str, engines: Sequence[EngineFigures]) -> MemoryRow:
    num_ranks = max(len(engine.rank_peak_memory_bytes) for engine in engines)
    peaks = tuple(
        max(engine.rank_peak_memory_bytes[rank] for engine in engines if rank < len(engine.rank_peak_memory_bytes))
        for rank in range(num_ranks)
    )
    predicted = next((engine.predicted_memory_bytes for engine in engines if engine.predicted_memory_bytes), None)
    return MemoryRow(
        label=label,
        num_trials=len(engines),
        device=engines[0].device,
        predicted_bytes=predicted,
        measured_bytes=max(peaks),
        rank_peak_bytes=peaks,
        ratio=max(peaks) / predicted if predicted else None,
        micro_batch_rows=min(engine.micro_batch_rows for engine in engines),
        checkpointing=any(engine.checkpointing for engine in engines),
    )
