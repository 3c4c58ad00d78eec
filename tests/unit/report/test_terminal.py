"""The live table, the log and the JSON lines of a running job."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from orchestrator.report.console import SafeConsole
from orchestrator.report.terminal import JsonView, LogView, SweepView, open_view
from orchestrator.transfer.run_view import Activity, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_through(view, make, num_trials=20):
    """A whole run as the runtime tells it."""
    sweep = make.sweep(num_trials)
    view.start(name="quickstart", metric="loss", higher_is_better=False, max_forgetting=0.1, num_trials=num_trials)
    view.phase("search")
    for trial in sweep.trials:
        view.trial(trial.model_copy(update={"state": "running", "rungs": ()}))
        view.trial(trial)
    view.event("gang_replaced", "gang 1 lost a rank\nand came back", gang=1)
    return sweep


def test_the_view_follows_where_the_output_goes():
    assert isinstance(open_view(stream=io.StringIO()), LogView)
    assert isinstance(open_view(stream=Terminal()), SweepView)
    assert isinstance(open_view(json_lines=True, stream=Terminal()), JsonView)


def test_a_log_has_a_line_per_event_and_no_control_codes(make):
    stream = io.StringIO()
    view = LogView(stream)
    run_through(view, make)
    view.close()
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "quickstart: 20 trials, compared by loss"
    assert any("gang_replaced: gang 1 lost a rank and came back" in line for line in lines)
    assert any("trial 9 failed" in line and "the loss became NaN" in line for line in lines)
    best = [line for line in lines if "best so far" in line]
    assert best, "the log says when there is a new best trial"
    assert "base 3.920" in best[-1]
    assert "head 3.100" in best[-1]
    assert "20 of 20 trials" in lines[-1]


def test_json_lines_are_strict_and_say_null_for_what_is_not_finite(make):
    """A `finetune` has no bound on forgetting."""
    stream = io.StringIO()
    view = JsonView(stream)
    view.start(name="one", metric="loss", higher_is_better=False, max_forgetting=math.inf, num_trials=1)
    view.event("broken", "a loss", loss=math.nan, where=Path("x"))
    events = [json.loads(line, parse_constant=pytest.fail) for line in stream.getvalue().splitlines()]
    assert events[0]["max_forgetting"] is None
    assert events[1]["fields"] == {"loss": None, "where": "x"}


def test_json_lines_are_one_object_each(make):
    stream = io.StringIO()
    view = JsonView(stream)
    sweep = run_through(view, make)
    view.close()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["kind"] for event in events[:2]] == ["start", "phase"]
    last = [event["trial"] for event in events if event["kind"] == "trial"][-1]
    assert last["trial_id"] == sweep.trials[-1].trial_id
    assert events[-1]["kind"] == "end"


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_live_table_is_at_most_100_columns_wide(make, width):
    console = SafeConsole(file=Terminal(), width=width, force_terminal=True, color_system=None)
    view = SweepView(console)
    sweep = run_through(view, make)
    long = sweep.trials[5].model_copy(update={"layers": "blocks:" + ",".join(map(str, range(0, 60, 2))), "state": "running"})
    view.trial(long)
    with console.capture() as captured:
        console.print(view.render())
    view.close()
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= min(width, 100)


def test_the_live_table_shows_the_best_trial_against_the_base(make):
    console = SafeConsole(file=Terminal(), width=100, force_terminal=True, color_system=None)
    view = SweepView(console)
    sweep = run_through(view, make)
    with console.capture() as captured:
        console.print(view.render())
    view.close()
    shown = captured.get()
    best = min((t for t in sweep.searched if t.score is not None), key=lambda t: t.score)
    assert f"best  {best.label}" in shown
    assert f"loss {best.metric:.3f}, base 3.920, head 3.100" in shown
    assert "(bound 0.1)" in shown
    assert "20 of 20 trials" in shown
    assert "1 failed" in shown
    assert "gang 1 lost a rank" in shown


def test_what_a_person_should_still_read_afterwards_stays_above_the_live_table(make):
    terminal = Terminal()
    view = SweepView(SafeConsole(file=terminal, width=60, force_terminal=True, color_system=None))
    view.event("output_moved", "the run goes to [elsewhere]")
    view.start(name="quickstart", metric="loss", higher_is_better=False, max_forgetting=0.1, num_trials=2)
    view.event("warning", "a warning of the plan that is longer than the terminal is wide, and is not cut")
    assert not view._events
    view.close()
    assert "output_moved: the run goes to [elsewhere]\n" in terminal.getvalue()
    assert "warning: a warning of the plan that is longer than the terminal is wide, and is not cut\n" in terminal.getvalue()


def test_a_view_that_was_never_started_can_be_closed():
    SweepView(SafeConsole(file=Terminal())).close()


def test_the_live_table_shows_what_is_awaited_from_the_first_phase_on(make):
    console = SafeConsole(file=Terminal(), width=80, force_terminal=True, color_system=None)
    view = SweepView(console)
    view.phase("start", "loading libraries")
    assert not view._live.is_started, "nothing would close it after an error"
    view.phase("data", "reading and tokenising")
    assert view._live.is_started
    sweep = make.sweep(6)
    view.start(name="quickstart", metric="loss", higher_is_better=False, max_forgetting=0.1, num_trials=6)
    first, second = (trial.model_copy(update={"state": "running", "rungs": ()}) for trial in sweep.searched[:2])
    view.trial(first)
    view.trial(second)
    activity = Activity(doing="training", gang=0, trial_id=first.trial_id, step=31, stop_step=54, total_steps=54)
    loading = Activity(doing="loading the base model", gang=1)
    view.progress(Progress(phase="search", activities=(activity, loading), seconds_left=84.0, at=1.0))
    with console.capture() as captured:
        console.print(view.render())
    view.close()
    shown = captured.get()
    assert "gang 1 loading the base model" in shown
    assert "about 1m24s left, until" in shown
    table = [line for line in shown.splitlines() if " lr " in line]
    assert any("31/54" in line and "training" in line for line in table)
    assert any("0/54" in line and "waiting" in line for line in table)
    assert all("lr " in line and "…" not in line for line in table), "a trial's rate can be read at 80 columns"
