"""The layout of a run's folder: the names of all files that more than one part of the program reads or writes.

The names are a contract with run folders of older versions: a new name needs a reader that still knows the old one.
"""

from __future__ import annotations

from pathlib import Path

IDENTITY = "run.json"
PLAN = "plan.json"
SPEC = "spec.yaml"
SWEEP = "sweep.json"
TRIALS = "trials"
PROGRESS = "progress.json"
"""The phase and activities of the run, updated while its driver works (`transfer.run_view.Progress`)."""

TRIAL, END = "trial.json", "end.json"
"""In a trial's folder: its registration, written before it starts, and how it ended."""
RESULT = "result.json"
"""The result that a worker group of Ray Train writes itself: in refit/, and in trials/none/ during the one-trial job."""
EVALUATION = "eval.npz"
"""Losses by eval document: in a rung's folder, for the base model in its trial's folder."""
STEPS = "steps.jsonl"
OWNER = TRIAL
"""In refit/: the id of the trial that it belongs to."""
STARTS = "starts.txt"
"""In refit/: one line for each time that its worker group has loaded the base model."""


class RunFolder:
    """Paths in a run's folder. Reads and writes nothing, so it serves for unfinished and damaged runs as well."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def identity_file(self) -> Path:
        """Name, spec hash, submissions, versions and the resolved spec."""
        return self.path / IDENTITY

    @property
    def spec(self) -> Path:
        """The spec as it was submitted."""
        return self.path / SPEC

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    @property
    def base(self) -> Path:
        """The identity of the base model: its config and the hashes of its weight files."""
        return self.path / "base.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def data_summary(self) -> Path:
        return self.data / "summary.json"

    @property
    def events(self) -> Path:
        """Automatic actions and notices, one line each."""
        return self.path / "events.jsonl"

    @property
    def progress(self) -> Path:
        return self.path / PROGRESS

    @property
    def hours(self) -> Path:
        """GPU-hours used over all submissions."""
        return self.path / "hours.json"

    @property
    def layer_scores(self) -> Path:
        """The score of each block; written once, before the first trial."""
        return self.path / "layer_scores.json"

    @property
    def compile_choice(self) -> Path:
        """The decision whether trials train with compiled blocks; written once, before the first trial."""
        return self.path / "compile.json"

    @property
    def domain_shift(self) -> Path:
        """The distance between target and retention set; written once, before the first trial."""
        return self.path / "domain_shift.json"

    @property
    def trials(self) -> Path:
        return self.path / TRIALS

    @property
    def refit(self) -> Path:
        return self.path / "refit"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    @property
    def bundling(self) -> Path:
        """The current activity of the worker that merges, verifies and scores."""
        return self.path / "bundling.json"

    @property
    def promoted_losses(self) -> Path:
        """The promoted model's loss on every test document."""
        return self.path / "test" / "promoted.npz"

    @property
    def sweep(self) -> Path:
        return self.path / SWEEP

    @property
    def transfer(self) -> Path:
        return self.path / "transfer.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def steps(self, trial_id: str) -> Path:
        return self.trials / trial_id / STEPS


def rung_file(rung: int) -> str:
    """Return the name of a rung's result in its trial's folder."""
    return f"result-{rung}.json"


def rung_files(trial_folder: Path) -> list[Path]:
    """Return the results of a trial's rungs, in order."""
    return sorted(trial_folder.glob("result-*.json"), key=rung_number)


def rung_number(file: Path) -> int:
    """Return the rung of `result-<rung>.json`; -1 for another file."""
    number = file.stem.removeprefix("result-")
    return int(number) if number.isdecimal() else -1
