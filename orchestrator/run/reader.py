"""A run directory, read as far as possible: a run in progress, a killed or a failed one has a report too.

Trials are read and scored by the functions that the runtime uses, so that a report shows what the search saw.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from orchestrator.errors import IntegrityError, UsageError
from orchestrator.plan.values import RunPlan, SweepPlan
from orchestrator.run.layout import OWNER, RESULT, STEPS, RunFolder
from orchestrator.run.ledger import Ledger, TrialEnd, TrialEntry, base_result
from orchestrator.run.records import trial_record
from orchestrator.run.scoring import scoring_of
from orchestrator.spec.models import SearchSpec
from orchestrator.store import read_record
from orchestrator.store.folders import MANIFEST
from orchestrator.transfer.records import SweepResult, TransferReport, TrialRecord
from orchestrator.transfer.run_view import Progress
from orchestrator.values import Value
from orchestrator.work.measurements import DomainShift, LayerScores
from orchestrator.work.results import RungResult, StepReport

SILENT_S = 60.0
"""Seconds without a write of progress.json after which the driver or its machine is taken to be gone."""
AFTER_SEARCH = ("refit", "merge", "verify", "test")
"""Phases in which sweep.json holds the results of this submission's search."""
Read = TypeVar("Read", bound=Value)


@dataclass(frozen=True)
class RunRecords:
    """The content of a run directory. What is not there yet is None or empty; `gaps` says in words what could not be read."""

    folder: Path
    name: str
    spec_text: str
    plan: RunPlan | None
    sweep: SweepResult | None
    """Summarised from the trials' folders where the run has not written one yet."""
    transfer: TransferReport | None
    complete: bool
    """True if the run has finished."""
    steps: dict[str, tuple[StepReport, ...]] = field(default_factory=dict)
    """By trial id, in order of steps."""
    events: tuple[dict[str, Any], ...] = ()
    layer_scores: LayerScores | None = None
    """The score of each block; None where the blocks are not scored, or not yet."""
    domain_shift: DomainShift | None = None
    """The distance between target and retention set; None where it is not measured, or not yet."""
    data_summary: dict[str, Any] = field(default_factory=dict)
    bundle_manifest: dict[str, Any] = field(default_factory=dict)
    gaps: tuple[str, ...] = ()
    results: tuple[RungResult, ...] = ()
    """Results of every rung of every trial and control, in the order in which gangs started them."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Content of run.json: name, created, submissions, versions, values (the resolved spec); empty where it cannot be read."""
    submissions: tuple[float, ...] = ()
    """Unix times at which the run was submitted."""
    progress: Progress | None = None
    """The driver's last progress.json; None where it never wrote one."""
    refit_of: str = ""
    """Id of the trial that owns refit/."""
    read_at: float = 0.0
    """Unix time at which the records were read."""

    @property
    def created(self) -> float | None:
        """Unix time of the first submission; None if run.json does not have it."""
        created = self.identity.get("created")
        return float(created) if isinstance(created, int | float) else None

    @property
    def alive(self) -> bool:
        """Return whether a driver is running the run, judged by its last progress.json."""
        now = self.progress
        return not self.complete and now is not None and not now.ended and self.read_at - now.at < SILENT_S

    def step_of(self, trial: TrialRecord) -> int:
        """Return the last recorded step of a trial, in its search or its refit."""
        steps = self.steps_of(trial)
        return steps[-1].step if steps else 0

    def steps_of(self, trial: TrialRecord) -> tuple[StepReport, ...]:
        """Return the recorded steps of a trial, of its search or its refit, whichever got further."""
        own = self.steps.get(trial.trial_id, ())
        refit = self.steps.get("refit", ()) if trial.trial_id == self.refit_of else ()
        return max(own, refit, key=lambda steps: steps[-1].step if steps else 0)

    def state_of(self, trial: TrialRecord) -> str:
        """Return the trial's state; for one that has not ended, whether it is training, waiting or interrupted."""
        if trial.state != "running":
            return trial.state
        if not self.alive or self.progress is None:
            return "interrupted"
        doing = [activity.doing for activity in self.progress.activities if activity.trial_id == trial.trial_id]
        return doing[0] if doing else "waiting"


def read_run(folder: Path) -> RunRecords:
    """Read a run directory. A damaged file, or one of another version, is a gap with its reason, not an error.

    Raises:
        UsageError: `folder` is not a run directory.
    """
    folder = Path(folder)
    run = RunFolder(folder)
    if not any(path.exists() for path in (run.plan, run.sweep, run.trials, run.spec)):
        raise UsageError(
            "not a run directory: neither plan.json nor sweep.json nor trials/ is in it",
            where=str(folder),
            expected="a folder that a sweep or finetune wrote, such as runs/quickstart",
            remedy="give the run's folder; `orchestrator sweep SPEC` makes one",
        )
    gaps: list[str] = []
    identity, spec_text = _object(run.identity_file, gaps), _text(run.spec, gaps)
    plan = _value(run.plan, RunPlan, gaps)
    ledger = Ledger(run.trials, lambda path, what: gaps.append(f"{path.parent.name}/{path.name}: {what}"))
    steps = {trial.name: _steps(trial / STEPS, gaps) for trial in _folders(run.trials)}
    if (run.refit / STEPS).exists():
        steps["refit"] = _steps(run.refit / STEPS, gaps)
    progress, read_at = _value(run.progress, Progress, gaps), time.time()
    active = progress is not None and not progress.ended and read_at - progress.at < SILENT_S
    finished = _value(run.sweep, SweepResult, gaps)
    if active and progress is not None and progress.phase not in AFTER_SEARCH:
        finished = None  # it is from an earlier submission: more trials are being searched
    results = (result for entry in ledger.entries() for result in entry.results)
    return RunRecords(
        folder=folder,
        name=finished.name if finished else plan.name if plan else folder.name,
        identity=identity,
        spec_text=spec_text,
        plan=plan,
        sweep=finished or _sweep_so_far(run, plan, _spec_values(identity, spec_text), ledger),
        transfer=None if active else _value(run.transfer, TransferReport, gaps),
        complete=not active and finished is not None and finished.finished_at is not None,
        steps=steps,
        events=tuple(_lines(run.events, gaps, dict)),
        layer_scores=_value(run.layer_scores, LayerScores, gaps),
        domain_shift=_value(run.domain_shift, DomainShift, gaps),
        data_summary=_object(run.data_summary, gaps),
        bundle_manifest=_object(run.bundle / MANIFEST, gaps),
        results=tuple(sorted(results, key=lambda result: result.started_at)),
        submissions=_submissions(identity),
        progress=progress,
        refit_of=str(_object(run.refit / OWNER, gaps).get("trial_id", "")),
        read_at=read_at,
        gaps=tuple(gaps),
    )


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run."""
    return RunFolder(folder).identity_file.is_file()


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of the runs in `folder`, or `folder` itself where it is one."""
    return [folder] if is_run(folder) else sorted(child for child in _folders(folder) if is_run(child))


def num_bytes_of(folder: Path) -> int:
    """Return the disk space of a folder: a file with several hard links counts once, symbolic links to elsewhere not at all."""
    sizes: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(Path(root) / name)
            except OSError:  # a run in progress moves its files
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def promoted_losses(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (mean loss, supervised tokens) of each test document for the promoted model; None where they are not all finite."""
    file = RunFolder(folder).promoted_losses
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        sums, tokens = arrays["loss_sums"], arrays["num_tokens"]
    return (sums / tokens, tokens) if len(sums) and np.isfinite(sums).all() else None


def _submissions(identity: dict[str, Any]) -> tuple[float, ...]:
    found = identity.get("submissions")
    return tuple(time for time in found if isinstance(time, int | float)) if isinstance(found, list) else ()


def _folders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.iterdir() if child.is_dir()) if parent.is_dir() else []


def _text(path: Path, gaps: list[str]) -> str:
    try:
        if not path.exists():
            return ""
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text and path.suffix == ".json":
            gaps.append(f"{path.parent.name}/{path.name}: the file is empty")
        return text
    except OSError as error:
        gaps.append(f"{path.name}: {error}")
        return ""


def _value(path: Path, kind: type[Read], gaps: list[str]) -> Read | None:
    text = _text(path, gaps)
    if not text:
        return None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        # A plan is one of two kinds; the validator's own message already names the place of the error.
        where = ".".join(map(str, first["loc"]))
        message = first["msg"] if where else first["msg"].removeprefix("Value error, ")
        gaps.append(": ".join(part for part in (f"{path.parent.name}/{path.name}", where, message) if part))
        return None


def _object(path: Path, gaps: list[str]) -> dict[str, Any]:
    text = _text(path, gaps)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        gaps.append(f"{path.parent.name}/{path.name}: not valid JSON: {error}")
        return {}
    if isinstance(value, dict):
        return value
    gaps.append(f"{path.parent.name}/{path.name}: no JSON object")
    return {}


def _lines(path: Path, gaps: list[str], read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Read a JSONL file. A torn last line, which a kill leaves, is left out; any other bad line is a gap."""
    lines = _text(path, gaps).split("\n")
    found: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(read(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):
                gaps.append(f"{path.parent.name}/{path.name}:{number}: {str(error).splitlines()[0]}")
    return found


def _steps(path: Path, gaps: list[str]) -> tuple[StepReport, ...]:
    """Read steps in order; where a resumed trial wrote a step again, the later line counts."""
    by_step = {report.step: report for report in _lines(path, gaps, StepReport.model_validate)}
    return tuple(by_step[step] for step in sorted(by_step))


def _sweep_so_far(run: RunFolder, plan: RunPlan | None, values: dict[str, Any], ledger: Ledger) -> SweepResult | None:
    """Summarise the trials so far as `runtime.outcome.summarise` would, without a promotion."""
    entries = [_settled(entry) for entry in ledger.entries() if entry.trial.control != "curve"]
    if not entries and plan is None:
        return None
    one_trial = plan is not None and not isinstance(plan, SweepPlan)
    scoring = scoring_of(None if one_trial else _search_spec(values), plan)
    base = base_result(ledger) or _lone_result(run.trials / "none")
    options = {(o.layers, o.method): o for o in plan.options} if isinstance(plan, SweepPlan) else {}
    trials: list[TrialRecord] = []
    for entry in entries:
        if entry.trial.control == "none" and not entry.results and base is not None:
            entry = entry.model_copy(update={"results": (base,)})
        record = trial_record(entry, scoring, base)
        option = options.get((record.layers, record.method))
        if record.engine is None and option is not None:  # nothing is measured yet: the planned number
            record = record.model_copy(update={"trainable_parameters": option.selection.num_trainable_parameters})
        trials.append(record)
    return SweepResult(
        name=plan.name if plan else run.path.name,
        job="finetune" if one_trial else "sweep",
        task=plan.base.task if plan else str(values.get("task", "completion")),
        metric=scoring.metric,
        higher_is_better=scoring.higher_is_better,
        max_forgetting=scoring.max_forgetting,
        trials=tuple(trials),
        winner_id=None,
        promotion_reason="the run has not ended",
        num_gangs=plan.num_gangs if plan else 1,
        ranks_per_gang=plan.execution.ranks if plan else 1,
    )


def _settled(entry: TrialEntry) -> TrialEntry:
    """Return a failed trial with its end, where the writer was killed between the two: a resumed run ends it the same way."""
    failed = next((result for result in entry.results if result.state == "failed"), None)
    if failed is None or entry.end is not None:
        return entry
    return entry.model_copy(update={"end": TrialEnd(state="failed", reason=failed.reason)})


def _lone_result(folder: Path) -> RungResult | None:
    """Read what the worker group of the one-trial job writes for the base model; the ledger gets it when the job ends."""
    try:
        return read_record(folder / RESULT, RungResult)
    except (OSError, IntegrityError):
        return None


def _search_spec(values: dict[str, Any]) -> SearchSpec:
    """Return the keys that score a trial, with the spec's defaults.

    Only these are read, so that a spec of another version, whose other keys may be unknown here, is scored by its own values.
    """
    section = values.get("search")
    found = section if isinstance(section, dict) else {}
    try:
        return SearchSpec.model_validate({key: found[key] for key in ("metric", "max_forgetting") if key in found})
    except ValidationError:
        return SearchSpec()


def _spec_values(identity: dict[str, Any], spec_text: str) -> dict[str, Any]:
    """Return the resolved spec, which has the values of `--set` too; without it the keys of spec.yaml."""
    values = identity.get("values")
    if isinstance(values, dict):
        return values
    try:
        spec = YAML(typ="safe", pure=True).load(spec_text) if spec_text else {}
    except (YAMLError, ValueError, RecursionError):
        return {}
    return spec if isinstance(spec, dict) else {}
