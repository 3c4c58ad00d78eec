"""The report of a run in progress: the step that stands on disk, who works in it, and a page that keeps itself up to date."""

from __future__ import annotations

import json
import time

import pytest

from orchestrator.report import live_page
from orchestrator.report.page import follow_run, render_page, write_report
from orchestrator.run.layout import PROGRESS
from orchestrator.run.reader import SILENT_S, read_run
from orchestrator.transfer.run_view import Activity, Progress
from tests.unit.fake_run import trial_spec, write_trial

from .test_page import read


@pytest.fixture
def running(fake_run, make):
    """A one-trial job at step 387 of 600, whose driver was heard of just now; `running(ended=True)` changes its heartbeat."""

    def write(**changes):
        folder = fake_run(plan=make.plan(search=False), sweep=None, transfer=None)
        trial = trial_spec().model_copy(update={"total_steps": 600})
        if not (folder / "trials" / trial.trial_id).exists():
            write_trial(folder, trial, results=[])
        (folder / "refit").mkdir(exist_ok=True)
        (folder / "refit" / "trial.json").write_text(json.dumps({"trial_id": trial.trial_id}))
        step = make.steps(make.trial(0, "all", "lora", 8, 1e-3))[0]
        lines = (step.model_copy(update={"step": number, "tokens": 100 * number}).model_dump_json() for number in range(1, 388))
        (folder / "refit" / "steps.jsonl").write_text("\n".join(lines) + "\n")
        activity = Activity(
            doing="training", trial_id=trial.trial_id, step=387, stop_step=600, total_steps=600, loss=1.5, tokens_per_s=3400.0
        )
        values = {"phase": "training", "at": time.time(), "activities": (activity,), "seconds_left": 60.0, "last_event": "a: b"}
        (folder / PROGRESS).write_text(Progress(**(values | changes)).model_dump_json())
        return folder

    return write


def test_a_run_in_progress_shows_the_step_that_stands_on_disk(running):
    page = read(write_report(running()))
    assert "0 of 600, now at 387" in page.text
    assert "In progress" in page.text
    assert "trial 0 training: step 387 of 600, loss 1.500, 3.4k tokens/s" in page.text
    assert "about 1m00s left" in page.text
    assert "Last event: a: b" in page.text
    assert "training loss, smoothed" in page.text, "its steps are drawn"
    assert page.count("script") == 0, "nobody writes it anew"


def test_a_silent_driver_is_told_and_its_trial_is_no_running_one(running):
    page = read(write_report(running(at=time.time() - SILENT_S - 5)))
    assert "No update since" in page.text
    assert "interrupted" in page.text
    assert "In progress" not in page.text


def test_a_driver_that_ended_with_an_error_says_which(running):
    page = read(write_report(running(ended=True, error="no place within 600 s")))
    assert "before it was finished: no place within 600 s" in page.text


def test_a_trial_without_a_gang_waits(running):
    run = read_run(running(activities=()))
    assert run.sweep is not None
    assert [run.state_of(trial) for trial in run.sweep.trials] == ["waiting"]


def test_an_old_verdict_is_not_shown_while_more_trials_are_searched(fake_run):
    folder = fake_run()
    assert read_run(folder).complete
    (folder / PROGRESS).write_text(Progress(phase="search", at=time.time()).model_dump_json())
    run = read_run(folder)
    assert not run.complete
    assert run.transfer is None
    (folder / PROGRESS).write_text(Progress(phase="search", at=time.time(), ended=True).model_dump_json())
    assert read_run(folder).complete


def test_a_followed_page_reloads_itself_where_the_reader_is(running):
    written = render_page(read_run(running()), reload_s=5.0)
    assert "location.reload()" in written
    assert "scrollY" in written
    assert "5 * 1000" in written
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in written


def test_a_run_that_has_ended_is_followed_to_its_end_at_once(fake_run, monkeypatch):
    monkeypatch.setattr(live_page.os, "nice", lambda _: 0)
    folder = fake_run()
    follow_run(folder, every_s=1000)
    assert read(folder / "report.html").count("script") == 0


def test_following_ends_with_the_run_and_leaves_a_page_that_stands_still(running, monkeypatch):
    monkeypatch.setattr(live_page.os, "nice", lambda _: 0)
    waited, written = [], []

    def write(reload_s):
        written.append(reload_s)
        return read_run(running(ended=len(waited) == 2))

    live_page.follow(write, every_s=7.0, wait=waited.append)
    assert waited == [7.0, 7.0]
    assert written == [7.0, 7.0, 7.0, None]
