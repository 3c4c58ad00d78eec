"""The current activity of a run, read from the files that its workers write while they work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from orchestrator.errors import IntegrityError
from orchestrator.run.layout import OWNER, RESULT, STARTS, STEPS, TRIAL, RunFolder, rung_files
from orchestrator.store import read_json, write_json
from orchestrator.transfer.run_view import Activity
from orchestrator.work.assignment import MeasureShift, ScoreBlocks, TimeCompiling, TrainRung, Work
from orchestrator.work.results import StepReport

TAIL_BYTES = 16 * 1024
"""Read from the end of steps.jsonl: about 40 steps, over which the shown rate is averaged."""


def ranks_text(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def last_steps(file: Path) -> list[StepReport]:
    """Return the last steps of a steps.jsonl, in order, read from its end; none where there is no file yet."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            start = max(0, stream.tell() - TAIL_BYTES)
            stream.seek(start)
            lines = stream.read().split(b"\n")
    except OSError:
        return []
    found: list[StepReport] = []
    for line in lines[1 if start else 0 :]:  # the first may begin in the middle of a step
        try:
            found.append(StepReport.model_validate(json.loads(line)))
        except (ValueError, ValidationError):
            continue  # an empty line, or one that is being written
    return found


MEASURING = {
    ScoreBlocks: "scoring the blocks",
    MeasureShift: "measuring the domain shift",
    TimeCompiling: "timing compiled blocks",
}


def activity_of(assignment: Work, gang: int) -> Activity:
    """Return the activity of a gang with this work, as far as it is known without reading files."""
    if isinstance(assignment, ScoreBlocks | MeasureShift | TimeCompiling):
        return Activity(doing=MEASURING[type(assignment)], gang=gang)
    trial = assignment.trial
    if not isinstance(assignment, TrainRung):
        return Activity(doing="evaluating the base model", gang=gang, trial_id=trial.trial_id)
    return Activity(
        doing="training",
        gang=gang,
        trial_id=trial.trial_id,
        stop_step=assignment.stop_step,
        total_steps=trial.total_steps,
    )


def with_steps(activity: Activity, file: Path) -> Activity:
    """Return a training activity with the step that it has reached; after its last step the trial is being scored.

    Args:
        file: The trial's steps.jsonl.
    """
    steps = last_steps(file)
    if not steps or activity.stop_step == 0:
        return activity
    last = steps[-1]
    if last.step >= activity.stop_step:
        return activity.model_copy(update={"doing": "scoring", "step": last.step, "loss": last.loss})
    timed = [(tokens, tokens / report.tokens_per_s) for tokens, report in _tokens_of(steps) if report.tokens_per_s > 0]
    seconds = sum(seconds for _, seconds in timed)
    rate = sum(tokens for tokens, _ in timed) / seconds if seconds > 0 else None
    to_come = (activity.stop_step - last.step) * last.tokens / last.step
    return activity.model_copy(
        update={
            "step": last.step,
            "loss": last.loss,
            "tokens_per_s": rate,
            "seconds_left": to_come / rate if rate else None,
        }
    )


def _tokens_of(steps: Sequence[StepReport]) -> Iterable[tuple[int, StepReport]]:
    """Yield each step with its own number of tokens.

    `tokens` counts from the start of the trial. The step before the first one in the tail is not known, so that one gets the
    average of all steps up to it.
    """
    before = steps[0].tokens - steps[0].tokens // max(1, steps[0].step)
    for report in steps:
        yield max(0, report.tokens - before), report
        before = report.tokens


def on_disk(run_folder: Path, phase: str, since: float) -> tuple[Activity, ...]:
    """Return what the refit's worker group or the bundling worker is doing; empty in other phases.

    Args:
        since: Unix time at which the phase began: older files are from an earlier submission.
    """
    run = RunFolder(run_folder)
    if phase in ("training", "refit"):
        return (_refit(run, since),)
    if phase in ("merge", "verify", "test"):
        return _bundling(run)
    return ()


def _refit(run: RunFolder, since: float) -> Activity:
    """Return what the worker group of Ray Train is doing; in the one-trial job it evaluates the base model first."""
    trial_id = str(_read(run.refit / OWNER).get("trial_id", ""))
    trial = _read(run.trials / trial_id / TRIAL).get("trial", {}) if trial_id else {}
    total = int(trial.get("total_steps", 0)) if isinstance(trial, dict) else 0
    training = Activity(doing="training", trial_id=trial_id, stop_step=total, total_steps=total)
    if _modified(run.refit / STARTS) < since:
        return training.model_copy(update={"doing": "waiting for free places and loading the base model"})
    none = run.trials / "none"
    if (none / TRIAL).exists() and not (none / RESULT).exists() and not rung_files(none):
        return Activity(doing="evaluating the base model", trial_id="none")
    return with_steps(training, run.refit / STEPS)


def tell_bundling(run_folder: Path, doing: str) -> None:
    """Record the next activity of the bundling worker, for `on_disk`."""
    write_json(RunFolder(run_folder).bundling, {"doing": doing, "since": time.time()})


def _bundling(run: RunFolder) -> tuple[Activity, ...]:
    doing = _read(run.bundling).get("doing")
    return (Activity(doing=str(doing)),) if doing else ()


def _modified(file: Path) -> float:
    """Return when a file was last written, as Unix time; 0 where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _read(file: Path) -> dict[str, object]:
    """Read a JSON object; an empty one where there is no file, or it cannot be read."""
    try:
        value = read_json(file)
    except (OSError, IntegrityError):
        return {}
    return value if isinstance(value, dict) else {}
