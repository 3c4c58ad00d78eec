"""The records that report and terminal show, made from the ledger; sweep.json and transfer.json, read and written."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from orchestrator.run.hours import may_go_on, read_hours
from orchestrator.run.layout import RunFolder
from orchestrator.run.ledger import DocumentLosses, Ledger, TrialEntry, base_result
from orchestrator.run.scoring import Scoring
from orchestrator.spec import JobSpec
from orchestrator.store import read_record, write_json
from orchestrator.transfer.records import EngineFigures, RungRecord, SweepResult, TransferReport, TrialRecord
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec


@dataclass(frozen=True)
class JudgedTrial:
    """A trial or control, judged once against the base model; the promotion and all later steps use this judgement."""

    entry: TrialEntry
    record: TrialRecord
    compared: RungResult | None
    """The rung that it is compared by: its last, or with early stopping its best. None where it reached none."""
    base: RungResult | None
    """The base model's scores, against which it is judged."""
    needs_refit: bool
    """True if it could still improve with more training; see `Scoring.needs_refit`."""
    _ledger: Ledger = field(repr=False, compare=False)

    @property
    def trial(self) -> TrialSpec:
        return self.entry.trial

    @property
    def bundled_steps(self) -> tuple[int, ...]:
        """Return how many steps the artifact has if this trial is bundled; two numbers if it is refitted, since the refit may be
        passed over for the trial's own rung."""
        assert self.compared is not None
        return (self.compared.step, self.trial.total_steps) if self.needs_refit else (self.compared.step,)

    @cached_property
    def losses(self) -> DocumentLosses | None:
        """Losses of the eval documents at the rung that it is compared by, read at first use; None if it failed or wrote none."""
        if self.compared is None or self.compared.state != "done":
            return None
        return self._ledger.document_losses(self.compared)


def judge_trials(ledger: Ledger, scoring: Scoring) -> dict[str, JudgedTrial]:
    """Judge every trial and control by id, in order of their numbers, as they are on disk now: the exchange, another process,
    writes them during a search."""
    ledger.refresh()
    base = base_result(ledger)
    return {entry.trial.trial_id: judge_trial(entry, scoring, base, ledger) for entry in ledger.entries()}


def judge_trial(entry: TrialEntry, scoring: Scoring, base: RungResult | None, ledger: Ledger) -> JudgedTrial:
    """Judge a trial.

    Args:
        base: The base model's scores.
        ledger: Where its losses of single documents are read from.
    """
    results = entry.results
    return JudgedTrial(
        entry=entry,
        record=trial_record(entry, scoring, base),
        compared=scoring.judged(results, base) if results else None,
        base=base,
        needs_refit=bool(results) and scoring.needs_refit(results, entry.trial.total_steps, base),
        _ledger=ledger,
    )


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
    """A finished run: its folder, the results of the search, and the verdict."""

    run_folder: Path
    sweep: SweepResult
    transfer: TransferReport


def read_outcome(run_folder: Path) -> RunOutcome | None:
    """Read the outcome of a run that has finished; None for any other."""
    sweep, transfer = read_sweep(run_folder), RunFolder(run_folder).transfer
    if sweep is None or sweep.finished_at is None or not transfer.exists():
        return None
    return RunOutcome(run_folder, sweep, read_record(transfer, TransferReport))


def read_finished_sweep(run: RunFolder, spec: JobSpec) -> RunOutcome | None:
    """Read the outcome of a sweep that is finished, unless the spec now gives it more trials or more GPU-hours."""
    assert spec.search is not None
    outcome = read_outcome(run.path)
    if outcome is None:
        return None
    ended, refit = outcome.sweep.ended_by_hours, outcome.transfer.refit
    if ended or (refit is not None and refit.left_out_for_hours):
        if may_go_on(outcome.sweep.max_gpu_hours, read_hours(run.hours), spec.resources.max_gpu_hours):
            return None
        if ended:
            return outcome
    return outcome if len(outcome.sweep.searched) >= spec.search.num_trials else None


def write_outcome(outcome: RunOutcome) -> RunOutcome:
    """Write transfer.json, then sweep.json with its end time: the end time implies that both files exist."""
    run = RunFolder(outcome.run_folder)
    write_json(run.transfer, outcome.transfer)
    sweep = outcome.sweep.model_copy(update={"finished_at": time.time(), "gpu_hours_used": read_hours(run.hours)})
    write_json(run.sweep, sweep)
    return RunOutcome(outcome.run_folder, sweep, outcome.transfer)


def read_sweep(run_folder: Path) -> SweepResult | None:
    """Read sweep.json, as this or an earlier submission left it."""
    file = RunFolder(run_folder).sweep
    return read_record(file, SweepResult) if file.exists() else None
