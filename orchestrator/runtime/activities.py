"""What a run is doing at this moment, from the files that its workers write while they work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from orchestrator.errors import IntegrityError
from orchestrator.store import read_json, write_json
from orchestrator.transfer.view import Activity
from orchestrator.work.assignment import MeasureShift, ScoreBlocks, TimeCompiling, TrainRung, Work
from orchestrator.work.results import StepReport

TAIL_BYTES = 16 * 1024
"""Of steps.jsonl: the last 40 steps or so, whose rate is the one shown."""
BUNDLING = "bundling.json"
"""In the run's folder: what the worker that merges, verifies and scores is doing."""
STARTS = "starts.txt"
"""In refit/: a line for every time that its worker group had loaded the base."""
OWNER = "trial.json"
"""In refit/: whose it is."""


def ranks_text(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def last_steps(file: Path) -> list[StepReport]:
    """The last steps of a steps.jsonl, in order, read from its end; none where there is no file yet."""
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
    """Return what a gang does with its work, as far as that is known without its files."""
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
    """A stretch of training with the step it has reached; where that is its last, the trial is being scored.

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
    """Each step with the tokens that it had; of the first one in the tail they follow from its place."""
    before = steps[0].tokens - steps[0].tokens // max(1, steps[0].step)
    for report in steps:
        yield max(0, report.tokens - before), report
        before = report.tokens


def on_disk(run_folder: Path, phase: str, since: float) -> tuple[Activity, ...]:
    """What the refit's worker group or the bundling worker is doing; nothing in other phases.

    Args:
        since: Unix time at which the phase began: older files tell of an earlier submission.
    """
    if phase in ("training", "refit"):
        return (_refit(run_folder, since),)
    if phase in ("merge", "verify", "test"):
        return _bundling(run_folder)
    return ()


def _refit(run_folder: Path, since: float) -> Activity:
    """The one-trial job's worker group evaluates the base model first."""
    folder = run_folder / "refit"
    trial_id = str(_read(folder / OWNER).get("trial_id", ""))
    trial = _read(run_folder / "trials" / trial_id / "trial.json").get("trial", {}) if trial_id else {}
    total = int(trial.get("total_steps", 0)) if isinstance(trial, dict) else 0
    training = Activity(doing="training", trial_id=trial_id, stop_step=total, total_steps=total)
    if _modified(folder / STARTS) < since:
        return training.model_copy(update={"doing": "waiting for free places and loading the base model"})
    none = run_folder / "trials" / "none"
    if (none / "trial.json").exists() and not any(none.glob("result*.json")):
        return Activity(doing="evaluating the base model", trial_id="none")
    return with_steps(training, folder / "steps.jsonl")


def tell_bundling(run_folder: Path, doing: str) -> None:
    """Write down what the bundling worker does next, for whoever watches the run."""
    write_json(run_folder / BUNDLING, {"doing": doing, "since": time.time()})


def _bundling(run_folder: Path) -> tuple[Activity, ...]:
    doing = _read(run_folder / BUNDLING).get("doing")
    return (Activity(doing=str(doing)),) if doing else ()


def _modified(file: Path) -> float:
    """Unix time; 0 where there is no such file."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _read(file: Path) -> dict[str, object]:
    """A JSON object; an empty one where there is none, or none that can be read."""
    try:
        value = read_json(file)
    except (OSError, IntegrityError):
        return {}
    return value if isinstance(value, dict) else {}
