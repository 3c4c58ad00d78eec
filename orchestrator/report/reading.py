"""A run directory, read as far as it goes: a run that is still going, was killed, or failed has a report too."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from orchestrator.errors import UsageError
from orchestrator.plan.values import RunPlan
from orchestrator.store import PROGRESS
from orchestrator.transfer import WORST_SCORE, forgetting, score
from orchestrator.transfer.measured import EngineFigures
from orchestrator.transfer.records import RungRecord, SweepResult, TransferReport, TrialRecord
from orchestrator.transfer.view import Progress
from orchestrator.values import Value
from orchestrator.work.measurements import DomainShift, LayerScores
from orchestrator.work.results import EngineRecord, RungResult, StepReport
from orchestrator.work.trial import TrialSpec

SILENT_S = 60.0
"""A heartbeat comes every few seconds; a driver that was silent for so long is gone, or its machine is."""
AFTER_SEARCH = ("refit", "merge", "verify", "test")
"""Phases in which sweep.json has the search as it was found."""
Read = TypeVar("Read", bound=Value)


@dataclass(frozen=True)
class RunRecords:
    """What a run directory says. Whatever is not there yet is None or empty; `gaps` says in words what could not be read."""

    folder: Path
    name: str
    spec_text: str
    plan: RunPlan | None
    sweep: SweepResult | None
    """Put together from the trials' folders where the run has not written one yet."""
    transfer: TransferReport | None
    complete: bool
    """Whether the run came to its end."""
    steps: dict[str, tuple[StepReport, ...]] = field(default_factory=dict)
    """By trial id, in order of steps."""
    events: tuple[dict[str, Any], ...] = ()
    layer_scores: LayerScores | None = None
    """What the probe found of each block; None where there was none, or none yet."""
    domain_shift: DomainShift | None = None
    """How far the target lies from the retention set; None where nobody asked, or not yet."""
    data_summary: dict[str, Any] = field(default_factory=dict)
    bundle_manifest: dict[str, Any] = field(default_factory=dict)
    gaps: tuple[str, ...] = ()
    results: tuple[RungResult, ...] = ()
    """Of every rung of every trial and control, in the order in which gangs took them up."""
    submissions: tuple[float, ...] = ()
    """Unix times at which the run was submitted."""
    progress: Progress | None = None
    """What the driver last said that the run is waiting for; None where it never did."""
    refit_of: str = ""
    """Id of the trial that refit/ belongs to."""
    read_at: float = 0.0
    """Unix time."""

    @property
    def alive(self) -> bool:
        """Whether a driver works in the run, as far as its heartbeat says."""
        now = self.progress
        return not self.complete and now is not None and not now.ended and self.read_at - now.at < SILENT_S

    def step_of(self, trial: TrialRecord) -> int:
        """The last step of a trial that stands on disk, of its search or of its refit."""
        steps = self.steps_of(trial)
        return steps[-1].step if steps else 0

    def steps_of(self, trial: TrialRecord) -> tuple[StepReport, ...]:
        """The steps of a trial that stand on disk, of its search or of its refit, whichever came further."""
        own = self.steps.get(trial.trial_id, ())
        refit = self.steps.get("refit", ()) if trial.trial_id == self.refit_of else ()
        return max(own, refit, key=lambda steps: steps[-1].step if steps else 0)

    def state_of(self, trial: TrialRecord) -> str:
        """The trial's state; of one that has not ended, whether it is being trained, waits, or was interrupted."""
        if trial.state != "running":
            return trial.state
        if not self.alive or self.progress is None:
            return "interrupted"
        doing = [activity.doing for activity in self.progress.activities if activity.trial_id == trial.trial_id]
        return doing[0] if doing else "waiting"


def read_run(folder: Path) -> RunRecords:
    """Read a run directory.

    Raises:
        UsageError: `folder` is not a run directory.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("plan.json", "sweep.json", "trials", "spec.yaml")):
        raise UsageError(
            "not a run directory: neither plan.json nor sweep.json nor trials/ is in it",
            where=str(folder),
            expected="a folder that a sweep or finetune wrote, such as runs/quickstart",
            remedy="give the run's folder; `orchestrator sweep SPEC` makes one",
        )
    gaps: list[str] = []
    spec_text = _text(folder / "spec.yaml", gaps)
    plan = _value(folder / "plan.json", RunPlan, gaps)
    steps = {trial.name: _steps(trial / "steps.jsonl", gaps) for trial in _folders(folder / "trials")}
    if (folder / "refit" / "steps.jsonl").exists():
        steps["refit"] = _steps(folder / "refit" / "steps.jsonl", gaps)
    progress, read_at = _value(folder / PROGRESS, Progress, gaps), time.time()
    active = progress is not None and not progress.ended and read_at - progress.at < SILENT_S
    finished = _value(folder / "sweep.json", SweepResult, gaps)
    if active and progress is not None and progress.phase not in AFTER_SEARCH:
        finished = None  # of an earlier submission: more trials are being searched
    return RunRecords(
        folder=folder,
        name=finished.name if finished else plan.name if plan else folder.name,
        spec_text=spec_text,
        plan=plan,
        sweep=finished or _sweep_so_far(folder, plan, spec_text, gaps),
        transfer=None if active else _value(folder / "transfer.json", TransferReport, gaps),
        complete=not active and finished is not None and finished.finished_at is not None,
        steps=steps,
        events=tuple(_lines(folder / "events.jsonl", gaps, dict)),
        layer_scores=_value(folder / "layer_scores.json", LayerScores, gaps),
        domain_shift=_value(folder / "domain_shift.json", DomainShift, gaps),
        data_summary=_object(folder / "data" / "summary.json", gaps),
        bundle_manifest=_object(folder / "bundle" / "manifest.json", gaps),
        results=_results(folder / "trials", gaps),
        submissions=_submissions(_object(folder / "run.json", gaps)),
        progress=progress,
        refit_of=str(_object(folder / "refit" / "trial.json", gaps).get("trial_id", "")),
        read_at=read_at,
        gaps=tuple(gaps),
    )


def _submissions(identity: dict[str, Any]) -> tuple[float, ...]:
    found = identity.get("submissions")
    return tuple(time for time in found if isinstance(time, int | float)) if isinstance(found, list) else ()


def _results(trials: Path, gaps: list[str]) -> tuple[RungResult, ...]:
    files = [file for trial in _folders(trials) for file in sorted(trial.glob("result-*.json"))]
    found = [_value(file, RungResult, gaps) for file in files]
    return tuple(sorted((result for result in found if result), key=lambda result: result.started_at))


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
        gaps.append(f"{path.parent.name}/{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
        return None


def _object(path: Path, gaps: list[str]) -> dict[str, Any]:
    text = _text(path, gaps)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        gaps.append(f"{path.parent.name}/{path.name}: {error}")
        return {}
    if isinstance(value, dict):
        return value
    gaps.append(f"{path.parent.name}/{path.name}: no JSON object")
    return {}


def _lines(path: Path, gaps: list[str], read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """Lines of a JSONL file. A last line that was torn by a kill is left out; another bad line is a gap."""
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
    """Steps in order; where a resumed trial wrote a step again, the later line counts."""
    by_step = {report.step: report for report in _lines(path, gaps, StepReport.model_validate)}
    return tuple(by_step[step] for step in sorted(by_step))


def _sweep_so_far(folder: Path, plan: RunPlan | None, spec_text: str, gaps: list[str]) -> SweepResult | None:
    search = _search_section(spec_text)
    metric = str(search.get("metric", "loss"))
    options = {} if plan is None or plan.search is None else {(o.layers, o.method): o for o in plan.search.options}
    trials: list[TrialRecord] = []
    for trial_folder in _folders(folder / "trials"):
        trial = _trial(trial_folder / "trial.json", gaps)
        if trial is None or trial.control == "curve":
            continue
        end = _object(trial_folder / "end.json", gaps)
        option = options.get((trial.layers, trial.method))
        # The one-trial job's worker group writes result.json for the base model; the record by rung follows at its end.
        files = sorted(trial_folder.glob("result-*.json")) or list(trial_folder.glob("result.json"))
        results = [_value(path, RungResult, gaps) for path in files]
        learns = option.selection.num_trainable_parameters if option else 0
        trials.append(_trial_record(trial, [result for result in results if result], end, metric, learns))
    if not trials and plan is None:
        return None
    base = next((trial.retain_loss for trial in trials if trial.control == "none"), None)
    asked = search.get("max_forgetting")
    bound = math.inf if plan is not None and plan.search is None else float(asked) if isinstance(asked, int | float) else 0.10
    best_counts = plan is not None and plan.search is not None and plan.search.patience is not None
    compared = [_compared(_scored(trial, base, metric, bound), best_counts) for trial in trials]
    return SweepResult(
        name=plan.name if plan else folder.name,
        job="finetune" if plan is not None and plan.search is None else "sweep",
        task=plan.base.task if plan else "completion",
        metric=metric,
        higher_is_better=metric != "loss",
        max_forgetting=bound,
        trials=tuple(sorted(compared, key=lambda trial: trial.number)),
        winner_id=None,
        promotion_reason="the run has not ended",
        num_gangs=plan.num_gangs if plan else 1,
    )


def _search_section(spec_text: str) -> dict[str, Any]:
    try:
        spec = YAML(typ="safe", pure=True).load(spec_text) if spec_text else {}
    except (YAMLError, ValueError, RecursionError):
        return {}
    section = spec.get("search") if isinstance(spec, dict) else None
    return section if isinstance(section, dict) else {}


def _trial(path: Path, gaps: list[str]) -> TrialSpec | None:
    written = _object(path, gaps)
    if not written:
        return None
    try:
        return TrialSpec.model_validate(written.get("trial", written))
    except ValidationError as error:
        gaps.append(f"{path.parent.name}/{path.name}: {error.errors()[0]['msg']}")
        return None


def _trial_record(
    trial: TrialSpec, results: Iterable[RungResult], end: dict[str, Any], metric: str, trainable_parameters: int
) -> TrialRecord:
    ordered = sorted(results, key=lambda result: result.rung)
    failed = next((result.reason for result in ordered if result.state == "failed"), "")
    done = [result for result in ordered if result.state == "done"]
    engine = next((result.engine for result in reversed(ordered) if result.engine), None)
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
        state="failed" if failed else _state(end),
        reason=failed or str(end.get("reason", "")),
        rungs=tuple(_rung_record(result, metric) for result in done),
        total_steps=trial.total_steps,
        trainable_parameters=engine.trainable_parameters if engine else trainable_parameters,
        gang=ordered[-1].gang if ordered else -1,
        engine=engine_figures(engine) if engine else None,
    )


def _state(end: dict[str, Any]) -> Literal["running", "finished", "stopped", "failed"]:
    match end.get("state"):
        case "finished" | "stopped" | "failed" as state:
            return state
        case _:
            return "running"


def _rung_record(result: RungResult, metric: str) -> RungRecord:
    return RungRecord(
        rung=result.rung,
        step=result.step,
        tokens=result.tokens,
        train_loss=result.train_loss,
        eval_loss=result.eval_loss,
        metric=result.metrics.get(metric, result.eval_loss if metric == "loss" else None),
        retain_loss=result.retain_loss,
        retain_accuracy=result.retain_accuracy,
        seconds=result.train_seconds + result.eval_seconds,
    )


def engine_figures(engine: EngineRecord) -> EngineFigures:
    """The figures of an engine's record that reports show."""
    shown = {name: getattr(engine, name) for name in EngineFigures.model_fields}
    return EngineFigures.model_validate(shown)


def _scored(trial: TrialRecord, base_retain_loss: float | None, metric: str, bound: float) -> TrialRecord:
    """Its rungs with forgetting and with the score that the search minimises."""
    rungs: list[RungRecord] = []
    for rung in trial.rungs:
        after, lost = rung.retain_loss, None
        if after is not None and base_retain_loss is not None:
            lost = forgetting(after, base_retain_loss)
        value = WORST_SCORE if rung.metric is None else score(rung.metric, metric != "loss", lost, bound)
        rungs.append(rung.model_copy(update={"forgetting": lost, "score": value}))
    return trial.model_copy(update={"rungs": tuple(rungs)})


def _compared(trial: TrialRecord, best_counts: bool) -> TrialRecord:
    """Judged as the search judges it: by its last rung, or, where its held-out loss may end it, by the best so far."""
    if not best_counts or not trial.rungs:
        return trial
    return trial.model_copy(update={"judged_rung": min(trial.rungs, key=lambda rung: rung.score or 0.0).rung})
