"""The heartbeat: every phase is heard of, from the files that workers write while they work, and by one thread at a time."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.report.terminal import JsonView, LogView
from orchestrator.run.activities import last_steps, on_disk, tell_bundling, with_steps
from orchestrator.run.layout import OWNER, PROGRESS, STARTS
from orchestrator.runtime.run_progress import ProgressReporter
from orchestrator.store import read_json
from orchestrator.transfer.run_view import Activity, Progress
from orchestrator.work.results import StepReport

INTERVAL_S = 0.02


def step(number: int, *, tokens: int = 100, rate: float = 50.0) -> str:
    report = StepReport(
        step=number,
        epoch=0,
        tokens=number * tokens,
        supervised_tokens=10,
        loss=3.0 - 0.01 * number,
        loss_hex="0x0p+0",
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens_per_s=rate,
        memory_bytes=0,
    )
    return report.model_dump_json() + "\n"


def write_steps(file: Path, last: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(step(number) for number in range(1, last + 1)))
    return file


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- what is being done -----------------------------------------------------------------------------------------------


def test_a_stretch_of_training_has_its_step_loss_rate_and_end(tmp_path: Path) -> None:
    file = write_steps(tmp_path / "steps.jsonl", 387)
    found = with_steps(Activity(doing="training", stop_step=600, total_steps=600), file)
    assert (found.step, found.doing) == (387, "training")
    assert found.loss == pytest.approx(3.0 - 3.87)
    assert found.tokens_per_s == pytest.approx(50.0)
    assert found.seconds_left == pytest.approx(213 * 100 / 50)


def test_at_its_last_step_a_trial_is_being_scored(tmp_path: Path) -> None:
    found = with_steps(Activity(doing="training", stop_step=37), write_steps(tmp_path / "steps.jsonl", 37))
    assert (found.doing, found.step, found.seconds_left) == ("scoring", 37, None)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    file = write_steps(tmp_path / "steps.jsonl", 5)
    with file.open("a") as stream:
        stream.write(step(6)[:30])
    assert [report.step for report in last_steps(file)] == [1, 2, 3, 4, 5]
    assert last_steps(tmp_path / "none.jsonl") == []


def test_the_refit_is_followed_from_waiting_to_scoring(tmp_path: Path) -> None:
    """As the one-trial job's worker group leaves its files, one after the other."""

    def now() -> Activity:
        (found,) = on_disk(tmp_path, "training", since=0.5)
        return found

    trial = {"trial": {"trial_id": "t000-ab", "total_steps": 9}}
    for name, content in (("t000-ab", trial), ("none", {"trial": {"trial_id": "none"}})):
        (tmp_path / "trials" / name).mkdir(parents=True)
        (tmp_path / "trials" / name / "trial.json").write_text(json.dumps(content))
    assert now().doing == "waiting for free places and loading the base model"
    (tmp_path / "refit").mkdir()
    (tmp_path / "refit" / OWNER).write_text('{"trial_id": "t000-ab"}')
    (tmp_path / "refit" / STARTS).write_text("1\n")
    assert now().doing == "evaluating the base model"
    (tmp_path / "trials" / "none" / "result.json").write_text("{}")
    assert (now().doing, now().step, now().stop_step) == ("training", 0, 9)
    write_steps(tmp_path / "refit" / "steps.jsonl", 4)
    assert (now().doing, now().step, now().trial_id) == ("training", 4, "t000-ab")
    write_steps(tmp_path / "refit" / "steps.jsonl", 9)
    assert now().doing == "scoring"
    (again,) = on_disk(tmp_path, "training", since=time.time() + 1)
    assert again.doing.startswith("waiting"), "the files are an earlier submission's"


def test_the_bundling_worker_says_what_it_does(tmp_path: Path) -> None:
    assert on_disk(tmp_path, "merge", since=0) == ()
    tell_bundling(tmp_path, "verifying")
    assert on_disk(tmp_path, "merge", since=0) == (Activity(doing="verifying"),)
    (tmp_path / "bundling.json").write_text("torn {")
    assert on_disk(tmp_path, "merge", since=0) == ()


# -- the heartbeat ----------------------------------------------------------------------------------------------------


def test_no_phase_is_silent_in_a_log(tmp_path: Path) -> None:
    stream = io.StringIO()
    with ProgressReporter(LogView(stream, quiet_s=0.05), tmp_path, interval_s=INTERVAL_S) as reporter:
        reporter.phase("data", "reading and tokenising")
        until(lambda: stream.getvalue().count("data: reading and tokenising; ") >= 2)
        write_steps(tmp_path / "trials" / "t003-ab" / "steps.jsonl", 12)
        activity = Activity(doing="training", gang=0, trial_id="t003-ab", stop_step=40, total_steps=120)
        file = tmp_path / "trials" / "t003-ab" / "steps.jsonl"
        reporter.phase("search", "1 trial")
        with reporter.watching(lambda: (with_steps(activity, file),)):
            until(lambda: "search: trial 3 training: step 12 of 40 (of 120 in all), loss 2.880, 50 tokens/s" in stream.getvalue())
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_a_log_that_has_just_spoken_is_left_alone() -> None:
    stream = io.StringIO()
    view = LogView(stream, quiet_s=1000)
    view.phase("data")
    view.progress(Progress(phase="data"))
    assert len(stream.getvalue().splitlines()) == 1
    LogView(stream, quiet_s=0).progress(Progress(phase="data", phase_seconds=12.2))
    assert stream.getvalue().splitlines()[-1].endswith("data: in progress; 12s so far")


def test_json_lines_have_progress_objects(tmp_path: Path) -> None:
    stream = io.StringIO()
    with ProgressReporter(JsonView(stream, quiet_s=0.0), tmp_path, interval_s=INTERVAL_S) as reporter:
        reporter.phase("plan")
        until(lambda: '"progress"' in stream.getvalue())
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    found = [line for line in said if line["kind"] == "progress"][-1]
    assert found["phase"] == "plan"
    assert found.keys() >= {"at", "phase_seconds", "run_seconds", "activities", "seconds_left"}


def test_the_views_are_called_by_one_thread_at_a_time(tmp_path: Path) -> None:
    """A line that is written in two parts would be torn otherwise."""

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                super().write(part)
                time.sleep(0.001)
            return len(text)

    stream = Slow()
    with ProgressReporter(LogView(stream, quiet_s=0.0), tmp_path, interval_s=0.001) as reporter:
        reporter.phase("search")
        tellers = [threading.Thread(target=lambda: [reporter.event("note", "x" * 40) for _ in range(10)]) for _ in range(3)]
        for teller in tellers:
            teller.start()
        for teller in tellers:
            teller.join()
    events = [line for line in stream.getvalue().splitlines() if "note" in line]
    assert len(events) == 30
    assert all(line.endswith("note: " + "x" * 40) for line in events)


def test_the_runs_folder_says_what_is_awaited_and_how_the_driver_ended(tmp_path: Path) -> None:
    with ProgressReporter(LogView(io.StringIO()), tmp_path, interval_s=INTERVAL_S) as reporter:
        reporter.phase("search", "4 trials")
        reporter.event("gang_ready", "gang 0 ready in 3 s")
        until(lambda: (tmp_path / PROGRESS).exists())
    found = Progress.model_validate(read_json(tmp_path / PROGRESS))
    assert (found.phase, found.last_event, found.ended, found.error) == ("search", "gang_ready: gang 0 ready in 3 s", True, "")
    with pytest.raises(ValueError, match="no rows"), ProgressReporter(LogView(io.StringIO()), tmp_path, interval_s=INTERVAL_S):
        raise ValueError("no rows")
    assert Progress.model_validate(read_json(tmp_path / PROGRESS)).error == "no rows"


def test_a_look_that_fails_does_not_end_the_heartbeat(tmp_path: Path) -> None:
    stream, failures = io.StringIO(), [RuntimeError("Ray is gone")] * 3

    def look() -> tuple[Activity, ...]:
        if failures:
            raise failures.pop()
        return (Activity(doing="scoring the blocks", gang=1),)

    with ProgressReporter(LogView(stream, quiet_s=0.0), tmp_path, interval_s=INTERVAL_S) as reporter, reporter.watching(look):
        until(lambda: "gang 1 scoring the blocks" in stream.getvalue())


def test_a_run_that_has_ended_is_only_looked_at(tmp_path: Path) -> None:
    with ProgressReporter(LogView(io.StringIO()), None, interval_s=INTERVAL_S):
        time.sleep(3 * INTERVAL_S)
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_the_search_is_expected_at_the_rate_of_its_first_steps(tmp_path: Path) -> None:
    with ProgressReporter(LogView(io.StringIO()), tmp_path, interval_s=1000) as reporter:
        reporter.phase("search")
        assert reporter.now().seconds_left is None
        reporter.event("first_steps", "about an hour", wall_hours=1.0)
        left = reporter.now().seconds_left
        assert left is not None
        assert 3590 < left <= 3600
        reporter.phase("merge")
        assert reporter.now().seconds_left is None
