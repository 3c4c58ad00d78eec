"""From the ledger's entries to the records that report and terminal read."""

from __future__ import annotations

from orchestrator.run.ledger import Ledger, TrialEntry
from orchestrator.run.scoring import Scoring
from orchestrator.transfer.measured import EngineFigures
from orchestrator.transfer.records import RungRecord, TrialRecord
from orchestrator.work.memory_ladder import fits_in_no_way
from orchestrator.work.results import RungResult


def trial_records(ledger: Ledger, scoring: Scoring) -> tuple[TrialRecord, ...]:
    """Every trial and control of the ledger, by number."""
    base = base_result(ledger)
    return tuple(trial_record(entry, scoring, base) for entry in ledger.entries())


def base_result(ledger: Ledger) -> RungResult | None:
    """What the untouched base scored, once it has been measured."""
    entry = ledger.get("none")
    return entry.results[-1] if entry is not None and entry.results else None


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
        out_of_memory=any(result.relieved is not None or fits_in_no_way(result) for result in entry.results),
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
