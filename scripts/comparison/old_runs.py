"""Check that run folders made by a commit can still be reported, resumed, extended and merged by the present code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.comparison.figures import differences, read_json, run_figures, tensors, trial_label
from scripts.comparison.sides import NUM_TRIALS, Side

MERGED = 4
"""Number of the trial that is merged by name; the rule promotes another one."""


class UnexpectedError(Exception):
    """A command ended with 0 and left something else than it should."""


Check = Callable[[], str]
"""Does one thing with an old run; returns what was found.

Raises:
    JobFailedError: the command failed.
    UnexpectedError: its result is wrong.
"""

INTERRUPTED: dict[str, Callable[[Path], bool]] = {
    "search": lambda run: len(list(run.glob("trials/t*/end.json"))) >= 2,
    "zero3": lambda run: any(run.glob("refit/checkpoint-*")),
}
"""Job -> what its run folder must show before the job is stopped."""


def finished_checks(old: Side, jobs: list[str]) -> Iterator[tuple[str, Check]]:
    """Yield what is done with finished runs.

    Args:
        old: The present checkout, over the run folders of the commit.
    """
    for job in jobs:
        yield f"report {job}", lambda job=job: _report(old, job)
        yield f"resume {job}", lambda job=job: _resume(old, job)
    if "search" in jobs:
        yield "extend search", lambda: _extend(old)
        yield "merge search", lambda: _merge(old)


def interrupted_checks(old: Side, whole: Path, jobs: list[str]) -> Iterator[tuple[str, Check]]:
    """Yield what is done with runs that were stopped half-way.

    Args:
        old: The present checkout, over the run folders of the commit.
        whole: Folder of the jobs that the commit finished: the figures must be the same.
    """
    for job in jobs:
        yield f"finish {job}", lambda job=job: _finish(old, whole, job)


def _report(old: Side, job: str) -> str:
    page = old.run_folder(job) / "report.html"
    page.unlink()
    seconds = old.call(job, "-m", "orchestrator", "report", str(old.run_folder(job)))
    if not page.exists():
        raise UnexpectedError(f"{page} was not written")
    return f"{page.stat().st_size} bytes in {seconds:.0f} s"


def _resume(old: Side, job: str) -> str:
    before = _contents(old.run_folder(job))
    seconds = old.submit(job)
    after = _contents(old.run_folder(job))
    changed = [difference.name for difference in differences(before, after)]
    if changed:
        raise UnexpectedError(f"{len(changed)} files of trials changed, first {changed[0]}")
    return f"nothing trained again, {len(before)} files unchanged, {seconds:.0f} s"


def _extend(old: Side) -> str:
    run = old.run_folder("search")
    before = _contents(run, "steps.jsonl")
    seconds = old.submit("search", "--set", f"search.trials={NUM_TRIALS + 1}")
    after = _contents(run, "steps.jsonl")
    changed = [name for name, content in before.items() if after.get(name) != content]
    if changed or len(after) != len(before) + 1:
        raise UnexpectedError(
            f"expected one more steps.jsonl and {len(before)} unchanged; {len(after)} there, changed: {changed}"
        )
    return f"one more trial, the others unchanged, {seconds:.0f} s"


def _merge(old: Side) -> str:
    run = old.run_folder("search")
    (folder,) = (folder for folder in (run / "trials").iterdir() if trial_label(folder) == f"trial {MERGED}")
    seconds = old.call("search", "-m", "orchestrator", "merge", str(run), "--trial", str(MERGED), "--promote")
    if (bundled := read_json(run / "transfer.json")["trial_id"]) != folder.name:
        raise UnexpectedError(f"the bundle is of trial {bundled} instead of {folder.name}")
    *_, trained = sorted(folder.glob("rung-*/adapter/adapter_model.safetensors"))
    found = differences(dict(tensors(trained)), dict(tensors(run / "bundle" / "adapter" / "adapter_model.safetensors")))
    if found:
        raise UnexpectedError(f"the bundle's adapter is not the trained one: {found[0]}")
    return f"trial {MERGED} bundled, {seconds:.0f} s"


def _finish(old: Side, whole: Path, job: str) -> str:
    run = old.run_folder(job)
    state = "finished" if (run / "transfer.json").exists() else f"{len(_contents(run, 'steps.jsonl'))} trials begun"
    seconds = old.submit(job)
    expected, found = run_figures(whole / job / "runs" / job), run_figures(run)
    for part, figures in expected.items():
        if different := differences(figures, found.get(part, {})):
            raise UnexpectedError(f"{part}: {len(different)} of {len(figures)} figures differ; {different[0]}")
    return f"{state}, then the same {sum(map(len, expected.values()))} figures, {seconds:.0f} s"


def _contents(run: Path, pattern: str = "*") -> dict[str, str]:
    """Return the hash of every file of trials."""
    files = [file for part in ("trials", "refit") for file in sorted((run / part).rglob(pattern)) if file.is_file()]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.name != ".lock"}
