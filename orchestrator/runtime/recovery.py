"""Set aside the damaged records and checkpoints of a run before it continues, each with an event.

A damaged file is renamed to `<name>.damaged-<n>`. Whatever depended on it is repeated: a rung is trained from the last complete
one before it, a figure is measured again, the plan is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import IntegrityError
from orchestrator.plan.values import RunPlan
from orchestrator.run.directory import RunDirectory
from orchestrator.run.hours import HoursRecord
from orchestrator.run.layout import END, EVALUATION, OWNER, RESULT, TRIAL, rung_files
from orchestrator.run.ledger import TrialEnd, TrialHead
from orchestrator.store import check_folder, read_json, read_record, set_aside, write_json
from orchestrator.transfer.records import SweepResult, TransferReport
from orchestrator.transfer.run_view import RunView
from orchestrator.work.assignment import contradiction, ownership
from orchestrator.work.measurements import CompileChoice, DomainShift, LayerScores
from orchestrator.work.memory_ladder import REDUCED_WORK, ReducedWork
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

Read = Callable[[Path], Any]


def repair_run(run: RunDirectory, view: RunView) -> list[str]:
    """Set aside the damaged files of a run that this process holds; return what was reported of them.

    Checkpoints of a finished run are not read: nothing continues from them.
    """
    repair = _Repair(run, view)
    repair.check_records()
    plan = read_record(run.plan, RunPlan) if run.plan.exists() else None
    sweep = read_record(run.sweep, SweepResult) if run.sweep.exists() else None
    complete = sweep is not None and sweep.finished_at is not None and run.transfer.exists()
    for folder in sorted(path for path in run.trials.glob("*") if path.is_dir()):
        repair.check_trial(folder, plan, with_checkpoints=not complete)
    repair.restore_hours()
    repair.restore_choice()
    return repair.messages


class _Repair:
    def __init__(self, run: RunDirectory, view: RunView) -> None:
        self._run = run
        self._view = view
        self.messages: list[str] = []
        self._hours, self._seconds = 0.0, 0.0
        self._compiled: bool | None = None

    def check_records(self) -> None:
        run = self._run
        if (sweep := _tried(lambda: read_record(run.sweep, SweepResult))) is not None:
            self._hours = sweep.gpu_hours_used
        for path, read, remedy in (
            (run.plan, _as(RunPlan), "the run is planned again"),
            (run.base, _base, "it is written from the base's folder as it is now"),
            (run.layer_scores, _as(LayerScores), "the blocks are scored again"),
            (run.compile_choice, _as(CompileChoice), "the choice follows the trials so far, or is measured again"),
            (run.domain_shift, _as(DomainShift), "it is measured again"),
            (run.sweep, _as(SweepResult), "the search results are recomputed from its trials"),
            (run.transfer, _as(TransferReport), "the bundle is rebuilt and evaluated again"),
            (run.hours, _as(HoursRecord), "the hours are recomputed from the trials' results"),
            (run.refit / OWNER, _owner, "the refit continues from checkpoints of its own trial"),
            (run.refit / RESULT, _as(RungResult), "the refit continues from its newest complete checkpoint"),
            (run.refit / REDUCED_WORK, _as(ReducedWork), "the refit is retried as planned"),
        ):
            self._check(path, read, remedy)

    def check_trial(self, folder: Path, plan: RunPlan | None, *, with_checkpoints: bool) -> None:
        """Check one trial's records. Everything after a damaged rung is set aside with it."""
        head = folder / TRIAL
        if not head.exists():
            return
        if self._check(head, _as(TrialHead), "the trial is restarted"):
            for file in (*rung_files(folder), folder / END):
                self._put_away(file)
            return
        trial = read_record(head, TrialHead).trial
        self._check(folder / RESULT, _as(RungResult), "it continues from its newest complete checkpoint")
        self._check(folder / REDUCED_WORK, _as(ReducedWork), "it is retried as planned")
        self._check(folder / END, _as(TrialEnd), "the trial's end state is recomputed")
        rungs = rung_files(folder)
        for rung, file in enumerate(rungs):
            remedy = f"trial {trial.trial_id} is trained again from the rung before it"
            lost = self._check(file, _as(RungResult), remedy)
            if not lost:
                result = read_record(file, RungResult)
                self._count(trial, result)
                lost = self._check_checkpoint(folder, trial, result, plan) if with_checkpoints else False
            # Later rungs were trained from the damaged one.
            if lost:
                for later in (*rungs[rung:], folder / END):
                    self._put_away(later)
                return

    def _check_checkpoint(self, folder: Path, trial: TrialSpec, result: RungResult, plan: RunPlan | None) -> bool:
        """Return whether the rung has to be trained, or the base model evaluated, again."""
        if result.checkpoint is None:
            file = folder / EVALUATION
            return file.exists() and self._check(file, _arrays, f"{trial.trial_id} is scored again")
        checkpoint = folder / Path(result.checkpoint).name
        if not checkpoint.is_dir():
            return False  # removed by hand, or moved with its run: loading it reports that
        return self._check(
            checkpoint, _checkpoint_of(trial, plan), f"trial {trial.trial_id} is trained again from the rung before it"
        )

    def _count(self, trial: TrialSpec, result: RungResult) -> None:
        ranks = result.engine.ranks if result.engine is not None else 1
        self._seconds += ranks * (result.train_seconds + result.eval_seconds + result.trunk_seconds)
        if trial.control is None and result.engine is not None:
            self._compiled = result.engine.compiled

    def restore_hours(self) -> None:
        if _was_set_aside(self._run.hours) and not self._run.hours.exists():
            # The larger of two lower bounds: the bound on GPU-hours must not be exceeded because a record was lost.
            used = max(self._hours, self._seconds / 3600)
            write_json(self._run.hours, HoursRecord(used=used))

    def restore_choice(self) -> None:
        file = self._run.compile_choice
        if self._compiled is not None and _was_set_aside(file) and not file.exists():
            reason = "as the trials so far were trained: the record of the choice was damaged"
            write_json(file, CompileChoice(compiled=self._compiled, reason=reason))

    def _check(self, path: Path, read: Read, remedy: str) -> bool:
        """Return whether a file was damaged and has been set aside."""
        if not path.exists():
            return False
        try:
            read(path)
            return False
        except (IntegrityError, OSError) as error:
            what = error.what if isinstance(error, IntegrityError) else str(error)
        aside = set_aside(path)
        place = path.relative_to(self._run.path)
        message = f"{place} is damaged ({what}): set aside as {aside.name}; {remedy}"
        self.messages.append(message)
        self._view.event("record_damaged", message)
        self._run.event("record_damaged", message=message, path=str(place), aside=aside.name)
        return True

    def _put_away(self, path: Path) -> None:
        if path.exists():
            set_aside(path)


def _as(kind: type[Any]) -> Read:
    return lambda path: read_record(path, kind)


def _checkpoint_of(trial: TrialSpec, plan: RunPlan | None) -> Read:
    """Return what reads a trial's checkpoint: it must be complete, and of this run."""

    def read(path: Path) -> None:
        own = ownership(trial, plan.spec_sha256, plan.base_sha256) if plan is not None else ownership(trial)
        if other := contradiction(check_folder(path).about, own):
            raise IntegrityError(f"the checkpoint is {other}", where=str(path))

    return read


def _base(path: Path) -> None:
    known = read_json(path)
    if not isinstance(known, dict) or not all(isinstance(known.get(key), dict) for key in ("config", "weights")):
        raise IntegrityError("not the config and weights of a base", where=str(path))


def _owner(path: Path) -> None:
    known = read_json(path)
    if not isinstance(known, dict) or not isinstance(known.get("trial_id"), str):
        raise IntegrityError("not a trial's id", where=str(path))


def _arrays(path: Path) -> None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            losses = arrays["loss_sums"] / arrays["num_tokens"]
        if losses.ndim != 1 or not len(losses):
            raise ValueError("no losses")
    except Exception as error:  # zipfile, numpy and zlib each raise their own
        raise IntegrityError(f"no scores: {error}", where=str(path)) from None


def _tried(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (IntegrityError, OSError):
        return None


def _was_set_aside(path: Path) -> bool:
    return any(path.parent.glob(f"{path.name}.damaged-*"))
