"""Views of a run: a live table in a terminal, a log with one line per event, JSON lines for a script."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.report.console import SafeConsole
from orchestrator.report.progress import activity_text, left_text, progress_text
from orchestrator.report.wording import MISSING, best_trial, counts, metric_text, plural, signed, sort_trials
from orchestrator.transfer.records import TrialRecord
from orchestrator.transfer.run_view import Activity, Progress, RunView
from orchestrator.units import format_seconds, printable
from orchestrator.values import printable_json, strict_json

WIDTH = 100
QUIET_S = 7.5
"""Longest silence of a log. Progress arrives about once a second, so even a busy machine prints every ten seconds."""
FIRST = "start"
"""Phase before a run is opened."""
MAX_ROWS = 12
MAX_EVENTS = 3
LASTING = ("data", "warning", "default_section", "output_moved", "refit_passed_over", "control_left_out", "promoted_by_rule")
"""Events that stay on the terminal above the live table, which vanishes at the end."""


class Board:
    """Current state of the run, shared by all views."""

    def __init__(self) -> None:
        self.name = ""
        self.metric = "loss"
        self.higher_is_better = False
        self.max_forgetting = 0.0
        self.num_trials = 0
        self.phase = ""
        self.begun = False
        """Whether there is a plan."""
        self.now: Progress | None = None
        """What is awaited."""
        self.trials: dict[str, TrialRecord] = {}
        self.started = time.monotonic()

    @property
    def searched(self) -> list[TrialRecord]:
        return [trial for trial in self.trials.values() if trial.control is None]

    @property
    def best(self) -> TrialRecord | None:
        return best_trial(self.searched, self.higher_is_better)

    def value_of(self, control: str) -> float | None:
        return next((trial.metric for trial in self.trials.values() if trial.control == control), None)

    def counted(self) -> str:
        """Return `7 of 16 trials: 2 running, 3 finished, 2 stopped`."""
        by_state = [f"{count} {state}" for state, count in counts(self.searched).items() if count]
        total = max(self.num_trials, len(self.searched))
        return f"{len(self.searched)} of {plural(total, 'trial')}" + (": " + ", ".join(by_state) if by_state else "")

    def against_base(self, trial: TrialRecord | None) -> str:
        """Return `loss 1.830, base 3.920, head 3.100, forgetting +0.040 (bound 0.1)`."""
        said = [f"{self.metric} {metric_text(trial.metric if trial else None, self.metric)}"]
        said += [
            f"{control} {metric_text(value, self.metric)}"
            for control, value in (("base", self.value_of("none")), ("head", self.value_of("head")))
            if value is not None
        ]
        if trial is not None and trial.forgetting is not None:
            bound = f" (bound {self.max_forgetting:g})" if math.isfinite(self.max_forgetting) else ""
            said.append(f"forgetting {signed(trial.forgetting)}{bound}")
        return ", ".join(said)


class LogView:
    """Log with one line per event, without control codes; the current activities after a silence.

    Args:
        quiet_s: After so many seconds without a line.
    """

    def __init__(self, stream: TextIO, *, quiet_s: float = QUIET_S) -> None:
        self._stream = stream
        self._quiet_s = quiet_s
        self._board = Board()
        self._last_line = time.monotonic()

    def _say(self, line: str) -> None:
        print(printable(line.replace("\n", " ")), file=self._stream, flush=True)
        self._last_line = time.monotonic()

    def start(self, *, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
        _begin(self._board, name, metric, higher_is_better, max_forgetting, num_trials)
        self._say(f"{name}: {plural(num_trials, 'trial')}, compared by {metric}")

    def phase(self, name: str, detail: str = "") -> None:
        self._board.phase = name
        self._say(f"{self._clock()} {name}{': ' + detail if detail else ''}")

    def progress(self, now: Progress) -> None:
        if time.monotonic() - self._last_line >= self._quiet_s:
            self._say(f"{self._clock()} {progress_text(now)}")

    def trial(self, record: TrialRecord) -> None:
        before = self._board.best
        self._board.trials[record.trial_id] = record
        last = record.last
        at = f" at step {last.step} of {record.total_steps}" if last and last.step else ""
        reason = f": {record.reason}" if record.reason else ""
        figures = f"  {self._board.metric} {metric_text(last.metric, self._board.metric)}" if last else ""
        untouched = record.control == "none"
        figures += f"  forgetting {signed(last.forgetting)}" if last and last.forgetting is not None and not untouched else ""
        name = record.control or f"trial {record.number}"
        state = record.state if record.state != "running" else "evaluated" if last else "begins"
        self._say(f"{self._clock()} {name} {state}{at}  {record.label}{figures}{reason}")
        best = self._board.best
        if best is not None and record.trial_id == best.trial_id and (before is None or before.metric != best.metric):
            self._say(f"{self._clock()} best so far: {best.label}  {self._board.against_base(best)}")

    def event(self, kind: str, message: str, **fields: object) -> None:
        self._say(f"{self._clock()} {kind}: {message}")

    def close(self) -> None:
        if self._board.begun:
            self._say(f"{self._clock()} {self._board.counted()}")

    def _clock(self) -> str:
        return f"[{time.monotonic() - self._board.started:7.1f}s]"


class JsonView:
    """JSON lines: `kind` and the event's fields; every few seconds one of the kind `progress`.

    Args:
        quiet_s: Seconds between two of those.
    """

    def __init__(self, stream: TextIO, *, quiet_s: float = QUIET_S) -> None:
        self._stream = stream
        self._quiet_s = quiet_s
        self._last_progress = time.monotonic()

    def _say(self, kind: str, **fields: object) -> None:
        # Strict JSON: NaN, which JSON does not know, becomes null.
        said = strict_json({"kind": kind, "at": round(time.time(), 3), **fields})
        line = json.dumps(said, default=str, ensure_ascii=False, allow_nan=False)
        print(printable_json(line), file=self._stream, flush=True)

    def start(self, *, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
        settings = {"metric": metric, "higher_is_better": higher_is_better, "max_forgetting": max_forgetting}
        self._say("start", name=name, num_trials=num_trials, **settings)

    def phase(self, name: str, detail: str = "") -> None:
        self._say("phase", phase=name, detail=detail)

    def progress(self, now: Progress) -> None:
        if time.monotonic() - self._last_progress >= self._quiet_s:
            self._last_progress = time.monotonic()
            self._say("progress", **now.model_dump(mode="json", exclude={"at", "last_event", "ended", "error"}))

    def trial(self, record: TrialRecord) -> None:
        self._say("trial", trial=record.model_dump(mode="json"))

    def event(self, kind: str, message: str, **fields: object) -> None:
        self._say("event", event=kind, message=message, fields=fields)

    def close(self) -> None:
        self._say("end")


class SweepView:
    """Live table of a terminal: the best trial so far, the base model, and the trials; at most 100 columns."""

    def __init__(self, console: SafeConsole | None = None) -> None:
        self._console = console or SafeConsole(stderr=True)
        self._board = Board()
        self._events: list[str] = []
        # Rendered on rich's own timer, so that the clock advances between events.
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def start(self, *, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
        _begin(self._board, name, metric, higher_is_better, max_forgetting, num_trials)
        self._live.start()

    def phase(self, name: str, detail: str = "") -> None:
        self._board.phase = f"{name}: {detail}" if detail else name
        self._board.now = None
        if name != FIRST:  # until the run is opened nothing closes the view, and an error would leave the cursor hidden
            self._live.start()

    def progress(self, now: Progress) -> None:
        self._board.now = now

    def trial(self, record: TrialRecord) -> None:
        self._board.trials[record.trial_id] = record

    def event(self, kind: str, message: str, **fields: object) -> None:
        if kind in LASTING:
            self._console.print(Text(printable(f"{kind}: {message}")), soft_wrap=True)
            return
        self._events = [*self._events, printable(f"{kind}: {message}")][-MAX_EVENTS:]

    def close(self) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        """Return the current table."""
        board, best = self._board, self._board.best
        elapsed = format_seconds(time.monotonic() - board.started)
        title = [board.name, board.phase or "starting", elapsed]
        parts: list[RenderableType] = [_line(" · ".join(part for part in title if part), "bold")]
        left = left_text(board.now) if board.now is not None else ""
        counted = [part for part in (board.counted() if board.begun else "", left) if part]
        parts += [_line(line, "cyan") for line in (*self._awaited(), "; ".join(counted)) if line]
        if best is not None:
            parts += [_line(f"best  {best.label}", "green"), _line(f"      {board.against_base(best)}", "green")]
        if board.trials:
            parts.append(self._table(best))
        parts += [_line(event, "dim") for event in self._events]
        return Group(*parts)

    def _awaited(self) -> list[str]:
        """Return the activities besides the trials of the table."""
        now = self._board.now
        if now is None:
            return []
        shown = [activity for activity in now.activities if activity.trial_id not in self._board.trials]
        if now.phase in ("training", "refit"):
            shown = list(now.activities)
        return [activity_text(activity) for activity in shown[:MAX_EVENTS]]

    def _activity_of(self, trial: TrialRecord) -> Activity | None:
        now = self._board.now
        return next((each for each in now.activities if each.trial_id == trial.trial_id), None) if now is not None else None

    def _table(self, best: TrialRecord | None) -> Table:
        board = self._board
        table = Table(box=None, pad_edge=False, width=min(WIDTH, self._console.width), header_style="dim")
        table.add_column("#", justify="right", width=4)
        table.add_column("trial", no_wrap=True, ratio=1)
        steps = max((len(str(trial.total_steps)) for trial in board.trials.values()), default=1)
        metric = max(len(board.metric[:12]), 7)
        for name, width in (("step", max(2 * steps + 1, 4)), (board.metric[:12], metric), ("forgetting", 10), ("state", 9)):
            table.add_column(name, justify="right" if name != "state" else "left", width=width, no_wrap=True)
        running = [trial for trial in board.trials.values() if trial.state == "running"]
        ended = sort_trials([trial for trial in board.trials.values() if trial.state != "running"], board.higher_is_better)
        for trial in [*running, *ended][:MAX_ROWS]:
            last = trial.last
            style = "green" if best and trial.trial_id == best.trial_id else "red" if trial.state == "failed" else ""
            what = f"{trial.label}  {trial.reason}" if trial.state == "failed" else trial.label
            number = "" if trial.control else str(trial.number)
            now = self._activity_of(trial) if trial.state == "running" else None
            # Started but on no gang at the moment: between two rungs, or paused by the scheduler.
            state = "waiting" if trial.state == "running" and board.now is not None and now is None else trial.state
            step = f"{max(last.step if last else 0, now.step if now else 0)}/{trial.total_steps}"
            step = MISSING if trial.control == "none" else step
            figures = (step, metric_text(trial.metric, board.metric), signed(trial.forgetting), now.doing if now else state)
            table.add_row(number, *(Text(cell, overflow="ellipsis", no_wrap=True) for cell in (what, *figures)), style=style)
        hidden = len(board.trials) - MAX_ROWS
        if hidden > 0:
            table.add_row("", Text(f"and {hidden} more"), MISSING, MISSING, MISSING, "", style="dim")
        return table


def _line(written: str, style: str) -> Text:
    line = Text(printable(written.replace("\n", " ")), style=style, no_wrap=True, overflow="ellipsis")
    line.truncate(WIDTH, overflow="ellipsis")
    return line


def _begin(board: Board, name: str, metric: str, higher_is_better: bool, max_forgetting: float, num_trials: int) -> None:
    board.name, board.metric, board.num_trials = name, metric, num_trials
    board.higher_is_better, board.max_forgetting = higher_is_better, max_forgetting
    board.begun = True


def open_view(*, json_lines: bool = False, stream: TextIO | None = None) -> RunView:
    """Return the view for the output: JSON lines on request, a live table on a terminal, else a log.

    Args:
        stream: stderr unless given, so that stdout carries only results.
    """
    target = stream or sys.stderr
    if json_lines:
        return JsonView(target)
    if target.isatty():
        return SweepView(SafeConsole(file=target))
    return LogView(target)
