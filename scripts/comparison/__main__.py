"""Compare the numbers of this working tree with those of a commit: `scripts/same_numbers COMMIT`."""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.comparison.figures import Figures, differences, run_figures
from scripts.comparison.old_runs import INTERRUPTED, Check, UnexpectedError, finished_checks, interrupted_checks
from scripts.comparison.sides import CASES, JOBS, REPOSITORY, Case, JobFailedError, Side, cases_key

EQUAL = "equal"
FAILURES = (JobFailedError, UnexpectedError, OSError, LookupError, TypeError, ValueError)
"""A command failed, or its run folder has not what every run folder has."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else the job that runs would be left behind
    asked = arguments()
    if asked.list:
        print("\n".join(f"{name:<12}{case.job}" for name, case in CASES.items()))
        return 0
    cases = {name: case for name, case in CASES.items() if not asked.only or name in asked.only}
    jobs = [job for job in JOBS if any(case.job == job for case in cases.values())]
    try:
        with tempfile.TemporaryDirectory(prefix="same-numbers-") as temporary:
            kept = Kept(commit_of(asked.commit, asked.at), asked.at, asked.cache)
            if asked.old_runs:
                rows = list(compare_old_runs(kept, jobs))
            else:
                folder = asked.keep.resolve() / "head" if asked.keep else Path(temporary)
                rows = list(compare(kept, Side(REPOSITORY, folder), cases, jobs))
                if asked.keep:
                    shutil.copytree(kept.finished, asked.keep / kept.commit, dirs_exist_ok=True)
    except (JobFailedError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    return int(any(row[2] != EQUAL for row in rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/same_numbers", description=__doc__)
    parser.add_argument("commit", nargs="?", help="what the working tree is compared with")
    parser.add_argument("--at", type=Path, metavar="FOLDER", help="an existing clean checkout of COMMIT")
    parser.add_argument(
        "--only", nargs="+", choices=CASES, metavar="CASE", help="these cases only (and what else their jobs train)"
    )
    parser.add_argument("--old-runs", action="store_true", help="report, resume, extend and merge run folders that COMMIT made")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders of both sides here")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="FOLDER", help="results of commits; %(default)s")
    parser.add_argument("--list", action="store_true", help="print the cases and the jobs that train them")
    asked = parser.parse_args()
    if asked.commit is None and not asked.list:
        parser.error("COMMIT is missing")
    return asked


def default_cache() -> Path:
    return Path(os.environ.get("ORCHESTRATOR_CACHE", Path.home() / ".cache" / "orchestrator")) / "same-numbers"


def commit_of(name: str, at: Path | None) -> str:
    """Return the full hash of a commit.

    Raises:
        JobFailedError: there is none, or the checkout `at` is another one or was changed.
    """
    commit = _git(REPOSITORY, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise JobFailedError(f"{name} is no commit")
    if at is not None and (_git(at, "rev-parse", "HEAD") != commit or _git(at, "status", "--porcelain", "--untracked-files=no")):
        raise JobFailedError(f"{at} is not a clean checkout of {commit}")
    return commit


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True).stdout.strip()


class Kept:
    """The run folders of a commit, made once for each set of specs, data and packages.

    Records in a run folder name its checkpoints by path, so a run is used where it was made: in `work`, into which a copy
    is put back before anything is done with it.
    """

    def __init__(self, commit: str, at: Path | None, cache: Path) -> None:
        self.commit = commit
        self._folder = cache.resolve() / f"{commit[:12]}-{cases_key()}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._at = at
        self.finished = self._folder / "finished"
        self.interrupted = self._folder / "interrupted"

    def work(self, copies: Path) -> Path:
        return copies.with_name(f"{copies.name}-work")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one comparison at a time makes or uses the run folders of a commit."""
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def make(self, job: str) -> None:
        """Let the commit finish a job, unless it has."""
        if not (self.finished / job).exists():
            side = self._side(self.finished, job)
            print(f"[{self.commit[:7]}] {job}: {side.submit(job):.0f} s", file=sys.stderr)
            self._copy(job, self.finished)

    def make_interrupted(self, job: str) -> None:
        """Let the commit begin a job and stop it half-way, unless it has."""
        if not (self.interrupted / job).exists():
            stopped = self._side(self.interrupted, job).interrupt(job, INTERRUPTED[job])
            print(
                f"[{self.commit[:7]}] {job}: {'stopped half-way' if stopped else 'ended before it was stopped'}", file=sys.stderr
            )
            if not stopped:
                raise JobFailedError(f"{job} could not be stopped half-way")
            self._copy(job, self.interrupted)

    def restore(self, job: str, copies: Path) -> None:
        shutil.rmtree(self.work(copies) / job, ignore_errors=True)
        shutil.copytree(copies / job, self.work(copies) / job)

    def _side(self, copies: Path, job: str) -> Side:
        side = Side(self._at or self._checkout(), self.work(copies))
        side.check_imports()
        shutil.rmtree(side.folder / job, ignore_errors=True)
        side.write(job)
        return side

    def _copy(self, job: str, copies: Path) -> None:
        copies.mkdir(exist_ok=True)
        unfinished = copies / f".{job}"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(self.work(copies) / job, unfinished)
        unfinished.rename(copies / job)

    def _checkout(self) -> Path:
        """Return a folder with the commit's files. It stays: runs remember where their base lies."""
        checkout = self._folder / "checkout"
        if not checkout.exists():
            archive = subprocess.run(
                ["git", "-C", str(REPOSITORY), "archive", self.commit], capture_output=True, check=True
            ).stdout
            unfinished = self._folder / ".checkout"
            shutil.rmtree(unfinished, ignore_errors=True)
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(unfinished, filter="data")
            unfinished.rename(checkout)
        return checkout


Row = tuple[str, str, str]
"""Compared figure of both sides, and whether it is equal."""


def compare(kept: Kept, head: Side, cases: dict[str, Case], jobs: list[str]) -> Iterator[Row]:
    """Train on both sides; yield a row for each case and one for the rest of each job."""
    head.check_imports()
    for job in jobs:
        own = {name: case for name, case in cases.items() if case.job == job}
        shutil.rmtree(head.folder / job, ignore_errors=True)
        head.write(job)
        try:
            with kept.locked():
                kept.make(job)
            print(f"[working tree] {job}: {head.submit(job):.0f} s", file=sys.stderr)
            before = run_figures(kept.finished / job / "runs" / job)
            after = run_figures(head.run_folder(job))
        except FAILURES as error:
            yield from ((name, "-", _told(error)) for name in own)
            continue
        for name, case in own.items():
            labels = {f"trial {number}" for number in case.trials}
            row = _row(name, before, after, labels)
            if row[2] == EQUAL and not case.shows(head.run_folder(job), head.engines(case)):
                row = (*row[:2], "equal, but the job did not show this case: run it again")
            yield row
        trials = {f"trial {number}" for case in CASES.values() if case.job == job for number in case.trials}
        yield _row(f"{job}: rest", before, after, (before.keys() | after.keys()) - trials)


def _row(name: str, before: dict[str, Figures], after: dict[str, Figures], labels: set[str]) -> Row:
    """Return the row of some parts of a run."""
    sides = [
        {f"{label} {key}": value for label in sorted(labels) for key, value in side.get(label, {}).items()}
        for side in (before, after)
    ]
    found = differences(*sides)
    verdict = f"{len(found)} differ, first {found[0]}" if found else EQUAL if sides[0] else "no figures"
    return name, str(len(sides[0])), verdict


def compare_old_runs(kept: Kept, jobs: list[str]) -> Iterator[Row]:
    """Do with run folders of the commit what this working tree must still be able to do; yield a row for each."""
    stopped = [job for job in jobs if job in INTERRUPTED]
    with kept.locked():
        for job in jobs:
            kept.make(job)
            kept.restore(job, kept.finished)
        finished, interrupted = (Side(REPOSITORY, kept.work(copies)) for copies in (kept.finished, kept.interrupted))
        finished.check_imports()
        yield from map(_checked, finished_checks(finished, jobs))
        for job in stopped:
            try:
                kept.make_interrupted(job)
            except FAILURES as error:
                yield f"finish {job}", "-", _told(error)
                continue
            kept.restore(job, kept.interrupted)
            yield from map(_checked, interrupted_checks(interrupted, kept.finished, [job]))


def _checked(named: tuple[str, Check]) -> Row:
    name, check = named
    try:
        found = check()
    except FAILURES as error:
        return name, "-", _told(error)
    print(f"[working tree] {name}: {found}", file=sys.stderr)
    return name, found, EQUAL


def _told(error: Exception) -> str:
    """Print a failure whole; return its first line for the table."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return f"failed: {type(error).__name__}: {error}".splitlines()[0]


def table(rows: list[Row]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {amount:>{widths[1]}}  {verdict}" for name, amount, verdict in rows)


if __name__ == "__main__":
    sys.exit(main())
