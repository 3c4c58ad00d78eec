"""The records that report and terminal show, made from the ledger; sweep.json and transfer.json, read and written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.run.hours import read_hours
from orchestrator.run.layout import RunFolder
from orchestrator.run.ledger import Ledger, TrialEntry, base_result
from orchestrator.run.scoring import Scoring
from orchestrator.store import read_record, write_json
from orchestrator.transfer.records import EngineFigures, RungRecord, SweepResult, TransferReport, TrialRecord
from orchestrator.work.results import RungResult


def trial_records(ledger: Ledger, scoring: Scoring) -> tuple[TrialRecord, ...]:
    """Return a record of every trial and control, by number."""
    base = base_result(ledger)
    return tuple(trial_record(entry, scoring, base) for entry in ledger.entries())


def trial_record(entry: TrialEntry, scoring: Scoring, base: RungResult | None) -> TrialRecord:
    trial = entry.trial
    engine = next((result.engine for result in reversed(entry.results) if result.engine is not None), None)
    done = [result for result in entry.results if result.state == "done"]
    failed = next((result.reason for result in entry.results if result.state == "failed"), "")
    return TrialRecord(
        trial_id=trial.trial_id,
        number=trial.number,
        control=trial.control,
        share=trial.share,
        layers=trial.layers,
        tune=trial.tune,
        lora_rank=trial.lora_rank,
        adapter=trial.adapter,
        learning_rate=trial.learning_rate,
        remedies=str(trial.remedies),
        remedy_kinds=trial.remedies.kinds,
        seed=trial.seed,
        state=entry.end.state if entry.end is not None else "running",
        reason=failed or (entry.end.reason if entry.end is not None else ""),
        rungs=tuple(_rung_record(result, scoring, base) for result in done),
        judged_rung=scoring.judged(done, base).rung if done else None,
        total_steps=trial.total_steps,
        trainable_parameters=engine.trainable_parameters if engine is not None else 0,
        gang=entry.results[-1].gang if entry.results else -1,
        engine=EngineFigures.model_validate({name: getattr(engine, name) for name in EngineFigures.model_fields})
        if engine is not None
        else None,
        out_of_memory=any(result.ran_out_of_memory for result in entry.results),
    )


def _rung_record(result: RungResult, scoring: Scoring, base: RungResult | None) -> RungRecord:
    return RungRecord(
        rung=result.rung,
        step=result.step,
        tokens=result.tokens,
        train_loss=result.train_loss,
        eval_loss=result.eval_loss,
        metric=scoring.metric_of(result),
        retain_loss=result.retain_loss,
        retain_accuracy=result.retain_accuracy,
        forgetting=scoring.forgetting_of(result, base),
        score=scoring.score(result, base),
        seconds=result.train_seconds + result.eval_seconds,
    )


@dataclass(frozen=True)
class RunOutcome:
    """A finished run: its folder, what the search found, and what the result is worth."""

    run_folder: Path
    sweep: SweepResult
    transfer: TransferReport


def read_outcome(run_folder: Path) -> RunOutcome | None:
    """Read the outcome of a run that has finished; None for any other."""
    sweep, transfer = read_sweep(run_folder), RunFolder(run_folder).transfer
    if sweep is None or sweep.finished_at is None or not transfer.exists():
        return None
    return RunOutcome(run_folder, sweep, read_record(transfer, TransferReport))


def write_outcome(outcome: RunOutcome) -> RunOutcome:
    """Write transfer.json, then sweep.json with its end time: that time says that both are there."""
    run = RunFolder(outcome.run_folder)
    write_json(run.transfer, outcome.transfer)
    sweep = outcome.sweep.model_copy(update={"finished_at": time.time(), "gpu_hours_used": read_hours(run.hours)})
    write_json(run.sweep, sweep)
    return RunOutcome(outcome.run_folder, sweep, outcome.transfer)


def read_sweep(run_folder: Path) -> SweepResult | None:
    """Read sweep.json, as this or an earlier submission left it."""
    file = RunFolder(run_folder).sweep
    return read_record(file, SweepResult) if file.exists() else None
